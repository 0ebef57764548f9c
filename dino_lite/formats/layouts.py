"""Renames the weights of foreign transformers to ours, and reads a spec from their shapes."""

from __future__ import annotations

import re
from math import isqrt
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dino_lite.backbones.transformer import mlp_of
from dino_lite.contracts import UserError
from dino_lite.formats.dinov3 import BASE as DINOV3_BASE
from dino_lite.formats.dinov3 import rename

LOOKED_FOR = (
    "looked for the class token and blocks of a ViT as dino_lite, DINO, DINOv2, DINOv3, timm and "
    "Hugging Face name them, under any prefix"
)
STEM = "patch_embed.proj.weight"  # "D C p p": the only weight that depends on image channels
_OTHER_TASKS = ("head.", "head_dist.", "fc_norm.", "fc.", "pooler.", "classifier.")
_WRAPPERS = re.compile(r"(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_AVERAGED = re.compile(r"teacher|(?:^|[._])ema[._]")
# Heads by width of ViT-H, g and G (Zhai et al. 2022); others have heads of width 64.
_HEADS = {1280: 16, 1408: 16, 1664: 16}


class Layout(NamedTuple):
    """Whose names the weights have, and what cannot be read from shapes: how positions are
    resampled, the epsilon of norms (None: 1e-6), whether positions are RoPE's.
    """

    name: str
    position_offset: float = 0.0
    position_antialias: bool = True
    norm_eps: float | None = None
    rope: bool = False


# For offset and antialiasing see dino_family, 1A.7 and 1B.5; an offset of 0 resamples by size.
DINO = Layout("DINO", 0.1, False)
DINOV2 = Layout("DINOv2", 0.1, False)
DINOV2_REGISTERS = Layout("DINOv2 with registers", 0.0, True)
TIMM = Layout("timm", 0.0, True)
HF_VIT = Layout("Hugging Face ViT", 0.0, False, 1e-12)
HF_DINOV2 = Layout("Hugging Face Dinov2", 0.0, False)
HF_DINOV2_REGISTERS = Layout("Hugging Face Dinov2 with registers", 0.0, True)


class Found(NamedTuple):
    """A backbone found in a file: its weights by our names."""

    layout: Layout
    prefix: str
    weights: dict[str, Tensor]
    unused: list[str]  # the file's names that are not part of the backbone
    adapted: list[str]  # our names of weights whose values differ from the file's
    num_heads: int | None = None  # if known from more than the width


def find_backbone(tensors: dict[str, Tensor], about: dict[str, Any]) -> Found | None:
    """The backbone in `tensors` (the teacher's if there are several), or None.

    `about` is the content of config.json. Heads for other tasks are unused; unknown names are kept,
    so that loading them fails.
    """
    names = {name: _WRAPPERS.sub("", name) for name in tensors}
    anchors = [name.removesuffix("cls_token") for name in names.values() if _is_anchor(name)]
    if not anchors:
        return None
    prefix = _teachers(anchors)
    hugging_face = prefix.endswith("embeddings.")
    prefix = prefix.removesuffix("embeddings.")
    own = {
        plain.removeprefix(prefix): tensors[name]
        for name, plain in names.items()
        if plain.startswith(prefix) and not plain.removeprefix(prefix).startswith(_OTHER_TASKS)
    }
    unused = [
        name
        for name, plain in names.items()
        if not plain.startswith(prefix) or plain.removeprefix(prefix) not in own
    ]
    dinov3 = rename(own)
    if dinov3 is not None:
        weights, layout = dinov3.weights, Layout(dinov3.owner, norm_eps=1e-5, rope=True)
        left = set(dinov3.left)
        unused += [name for name, plain in names.items() if plain.removeprefix(prefix) in left]
    elif hugging_face:
        weights, layout = _from_hugging_face(own)
    else:
        weights, layout = _from_plain(own), _plain_layout(own, unused, about)
    positions = weights.get("pos_embed")
    if positions is not None and isqrt(positions.shape[1]) ** 2 == positions.shape[1] > 1:
        # No position for the class token: timm's ViTs with registers, DeiT III.
        none = torch.zeros_like(weights["cls_token"])
        weights["pos_embed"] = torch.cat([none, positions], dim=1)
    if "mask_token" in weights and weights["mask_token"].ndim > 2:
        weights["mask_token"] = weights["mask_token"].reshape(1, -1)
    kept = {id(value) for value in tensors.values()}
    adapted = [name for name, value in weights.items() if id(value) not in kept]
    num_heads = None if dinov3 is None else dinov3.num_heads
    return Found(layout, prefix, weights, unused, adapted, num_heads)


def own_weights(tensors: dict[str, Tensor], first: str) -> Found:
    """As `find_backbone`, of a backbone whose names are ours, `first` among them."""
    prefix = _teachers([n.removesuffix(first) for n in tensors if n.endswith(first)] or [""])
    weights = {n.removeprefix(prefix): v for n, v in tensors.items() if n.startswith(prefix)}
    unused = [name for name in tensors if not name.startswith(prefix)]
    return Found(Layout("dino_lite"), prefix, weights, unused, [])


def _teachers(prefixes: list[str]) -> str:
    """The prefix of a teacher's weights if there is one, else the first."""
    return min(prefixes, key=lambda name: not _AVERAGED.search(name))


def _is_anchor(name: str) -> bool:
    return name == "cls_token" or name.endswith(".cls_token")


def _from_plain(own: dict[str, Tensor]) -> dict[str, Tensor]:
    """The names of DINO, DINOv2, timm and dino_lite, which are almost identical."""
    weights = {}
    for name, value in own.items():
        # DINOv2 groups blocks in chunks for FSDP; the second number is the index over all chunks.
        name = re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", name)
        name = name.replace(".mlp.w12.", ".mlp.fc1.").replace(".mlp.w3.", ".mlp.fc2.")
        weights["register_tokens" if name == "reg_token" else name] = value
    return weights


def _plain_layout(own: dict[str, Tensor], unused: list[str], about: dict[str, Any]) -> Layout:
    """Distinguish DINOv2 (registers, mask token or SwiGLU), timm (config.json of timm, classifier,
    LayerScale, or no class position) and DINO (all others; timm's names are the same).
    """
    if "register_tokens" in own:
        return DINOV2_REGISTERS
    if "mask_token" in own or any(".mlp.w12." in name for name in own):
        return DINOV2
    classifier = any(name.startswith(("head.", "fc_norm.", "head_dist.")) for name in unused)
    cells = own["pos_embed"].shape[1] if "pos_embed" in own else 0
    scaled = "blocks.0.ls1.gamma" in own
    if "architecture" in about or classifier or scaled or isqrt(cells) ** 2 == cells:
        return TIMM
    return DINO


_HF_NAMES = (
    ("embeddings.cls_token", "cls_token"),
    ("embeddings.position_embeddings", "pos_embed"),
    ("embeddings.register_tokens", "register_tokens"),
    ("embeddings.mask_token", "mask_token"),
    ("embeddings.patch_embeddings.projection.", "patch_embed.proj."),
    ("layernorm.", "norm."),
)
_HF_BLOCK = (
    ("layernorm_before.", "norm1."),
    ("layernorm_after.", "norm2."),
    ("attention.output.dense.", "attn.proj."),
    ("layer_scale1.lambda1", "ls1.gamma"),
    ("layer_scale2.lambda1", "ls2.gamma"),
    ("intermediate.dense.", "mlp.fc1."),
    ("output.dense.", "mlp.fc2."),
    ("mlp.weights_in.", "mlp.fc1."),
    ("mlp.weights_out.", "mlp.fc2."),
)


def _from_hugging_face(own: dict[str, Tensor]) -> tuple[dict[str, Tensor], Layout]:
    """Hugging Face's names: queries, keys and values are separate layers."""
    weights: dict[str, Tensor] = {}
    apart: dict[str, dict[str, Tensor]] = {}
    for name, value in own.items():
        block = re.match(r"encoder\.layer\.(\d+)\.(.*)", name)
        if block is None:
            weights[_renamed(name, _HF_NAMES)] = value
            continue
        stem = f"blocks.{block[1]}."
        part = re.fullmatch(r"attention\.attention\.(query|key|value)\.(.*)", block[2])
        if part is None:
            weights[stem + _renamed(block[2], _HF_BLOCK)] = value
        else:
            apart.setdefault(f"{stem}attn.qkv.{part[2]}", {})[part[1]] = value
    for name, parts in apart.items():
        if len(parts) == 3:
            weights[name] = torch.cat([parts[which] for which in ("query", "key", "value")])
    if not any(name.endswith("layer_scale1.lambda1") for name in own):
        return weights, HF_VIT
    return weights, HF_DINOV2_REGISTERS if "register_tokens" in weights else HF_DINOV2


def _renamed(name: str, pairs: tuple[tuple[str, str], ...]) -> str:
    for theirs, ours in pairs:
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    return name


def spec_of(found: Found, about: dict[str, Any], asked: str, **overrides: Any) -> dict[str, Any]:
    """The spec of a backbone from the shapes of its weights, `about` (keys of Hugging Face's
    config.json), and `overrides`; later ones take precedence. `asked` is the prefix of messages:
    "checkpoint=FILE". Raises UserError.
    """
    weights, layout, first = found.weights, found.layout, "blocks.0."
    needed = [STEM, f"{first}attn.qkv.weight", f"{first}mlp.fc2.weight", "norm.weight"]
    missing = [n for n in ([] if layout.rope else ["pos_embed"]) + needed if n not in weights]
    if missing:
        raise UserError(
            f"{asked} has a class token but lacks {' and '.join(missing)} (in {layout.name}'s "
            "layout): only plain ViTs with learned positions and a last norm, and DINOv3 ViTs, can "
            "be opened."
        )
    width, (hidden, gated) = weights["cls_token"].shape[-1], _mlp_shape(weights)
    cells = 0 if layout.rope else weights["pos_embed"].shape[1] - 1
    _check_architecture(weights, about, asked, cells, "silu" if layout.rope and gated else "gelu")
    blocks = [int(name.split(".")[1]) for name in weights if re.match(r"blocks\.\d+\.", name)]
    scaled, patch = f"{first}ls1.gamma" in weights, weights[STEM].shape[-1]
    spec: dict[str, Any] = {
        "name": "vit",
        "embed_dim": width,
        "depth": max(blocks) + 1,
        "num_heads": overrides.get("num_heads") or _num_heads(found, about, asked),
        "patch_size": patch,
        "in_chans": weights[STEM].shape[1],
        "num_registers": weights["register_tokens"].shape[1] if "register_tokens" in weights else 0,
        "mask_token": "mask_token" in weights,
        "qkv_bias": any(f"{first}attn.qkv.{name}" in weights for name in ("bias", "q_bias")),
        "qk_norm": f"{first}attn.q_norm.weight" in weights,
        "init_values": 1.0 if scaled else None,
        "norm_eps": about.get("layer_norm_eps", layout.norm_eps),
        **mlp_of(width, hidden, gated),
    }
    if layout.rope:
        base = about.get("rope_theta", DINOV3_BASE)
        spec |= {"kind": "rope", "name": "rope", "rope_base": base}
        spec["init_values"] = float(scaled)  # None would mean DINOv3's default
    else:
        spec |= {
            "image_size": isqrt(cells) * patch,
            "position_offset": layout.position_offset,
            "position_antialias": layout.position_antialias,
        }
    return spec | overrides


def _check_architecture(
    weights: dict[str, Tensor], about: dict[str, Any], asked: str, cells: int, usual: str
) -> None:
    """Raise UserError if `about` contradicts the weights, or our transformers do not support the
    architecture; `usual` is their activation.
    """
    width, patch = weights["cls_token"].shape[-1], weights[STEM].shape[-2:]
    for word in ("hidden_size", "embed_dim"):
        if about.get(word, width) != width:
            raise UserError(
                f"{asked} has a width of {width}, but the JSON file next to it has {word}="
                f"{about[word]}: it belongs to other weights; remove it."
            )
    act = about.get("hidden_act", usual)
    if isqrt(cells) ** 2 != cells or patch[0] != patch[1] or act != usual:
        raise UserError(
            f"{asked} is not a ViT with {usual}, square patches and a square grid ({cells} "
            f"positions, patches of {tuple(patch)}, {act}), and others cannot be opened."
        )


def _num_heads(found: Found, about: dict[str, Any], asked: str) -> int:
    width = found.weights["cls_token"].shape[-1]
    usual = {4096: 32} if found.layout.rope else _HEADS  # DINOv3's 7B
    told = about.get("num_attention_heads") or found.num_heads or usual.get(width)
    if (told is None and width % 64) or not isinstance(told, int | None):
        raise UserError(
            f"{asked}: the number of heads for a width of {width} cannot be derived from the "
            'weights; write {"num_attention_heads": N} into NAME.json next to the file NAME.'
        )
    return int(told or width // 64)


def _mlp_shape(weights: dict[str, Tensor]) -> tuple[int, bool]:
    """Inputs of an MLP's second layer, and whether the MLP is gated."""
    hidden, first = weights["blocks.0.mlp.fc2.weight"].shape[1], "blocks.0.mlp.fc1.weight"
    return hidden, first in weights and weights[first].shape[0] == 2 * hidden
