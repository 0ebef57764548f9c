"""Names of a transformer's weights as other programs write them, in ours; and what shapes tell."""

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
    "looked for a class token and blocks as dino_lite, DINO, DINOv2, DINOv3, timm and Hugging Face "
    "name them, under any prefix"
)
STEM = "patch_embed.proj.weight"  # "D C p p": the one weight that knows the images' channels
_OTHER_TASKS = ("head.", "head_dist.", "fc_norm.", "fc.", "pooler.", "classifier.")
_WRAPPERS = re.compile(r"(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_AVERAGED = re.compile(r"teacher|(?:^|[._])ema[._]")
_HEADS = {1280: 16, 1408: 16, 1664: 16}  # ViT-H, g and G (Zhai et al. 2022); others: 64 a head


class Layout(NamedTuple):
    """Whose names they are, and what their owner does that no shape tells: how positions are
    resampled, what norms add to the variance (None: 1e-6), that there are none but RoPE.
    """

    name: str
    position_offset: float = 0.0
    position_antialias: bool = True
    norm_eps: float | None = None
    rope: bool = False


# The offset and the antialiasing are dino_family's 1A.7 and 1B.5; by size: 0.
DINO = Layout("DINO", 0.1, False)
DINOV2 = Layout("DINOv2", 0.1, False)
DINOV2_REGISTERS = Layout("DINOv2 with registers", 0.0, True)
TIMM = Layout("timm", 0.0, True)
HF_VIT = Layout("Hugging Face ViT", 0.0, False, 1e-12)
HF_DINOV2 = Layout("Hugging Face Dinov2", 0.0, False)
HF_DINOV2_REGISTERS = Layout("Hugging Face Dinov2 with registers", 0.0, True)


class Found(NamedTuple):
    """A backbone in a file: its weights by our names, and the file's names that were not taken."""

    layout: Layout
    prefix: str
    weights: dict[str, Tensor]
    unused: list[str]
    adapted: list[str]  # of ours, those whose values are not the file's as they stand
    num_heads: int | None = None  # where it is told by more than the width


def find_backbone(tensors: dict[str, Tensor], about: dict[str, Any]) -> Found | None:
    """The backbone in `tensors`, the teacher's where there are several; None where there is none.

    `about` is what config.json says. Weights of other tasks are unused; a name that nobody knows
    stays as it is, for the fit to refuse.
    """
    names = {name: _WRAPPERS.sub("", name) for name in tensors}
    anchors = [name.removesuffix("cls_token") for name in names.values() if _is_anchor(name)]
    if not anchors:
        return None
    prefix = min(anchors, key=lambda name: not _AVERAGED.search(name))  # else the file's first
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
        none = torch.zeros_like(weights["cls_token"])  # timm's registers and DeiT III
        weights["pos_embed"] = torch.cat([none, positions], dim=1)
    if "mask_token" in weights and weights["mask_token"].ndim > 2:
        weights["mask_token"] = weights["mask_token"].reshape(1, -1)
    kept = {id(value) for value in tensors.values()}
    adapted = [name for name, value in weights.items() if id(value) not in kept]
    num_heads = None if dinov3 is None else dinov3.num_heads
    return Found(layout, prefix, weights, unused, adapted, num_heads)


def _is_anchor(name: str) -> bool:
    return name == "cls_token" or name.endswith(".cls_token")


def _from_plain(own: dict[str, Tensor]) -> dict[str, Tensor]:
    """DINO's, DINOv2's, timm's and our own names, which are almost the same."""
    weights = {}
    for name, value in own.items():
        # DINOv2 keeps blocks in chunks for FSDP; the second number counts through.
        name = re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", name)
        name = name.replace(".mlp.w12.", ".mlp.fc1.").replace(".mlp.w3.", ".mlp.fc2.")
        weights["register_tokens" if name == "reg_token" else name] = value
    return weights


def _plain_layout(own: dict[str, Tensor], unused: list[str], about: dict[str, Any]) -> Layout:
    """Whose: timm's are those without a class position, without DINOv2's mask token, or with a
    classifier; the rest is DINO's, whose names timm's backbones alone share.
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
    """Hugging Face's names: queries, keys and values lie apart."""
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
    """The backbone's spec as its shapes tell it, then `about` (Hugging Face's words), then
    `overrides`. `asked` begins a message: "checkpoint=FILE".
    """
    weights, layout, first = found.weights, found.layout, "blocks.0."
    needed = [STEM, f"{first}attn.qkv.weight", f"{first}mlp.fc2.weight", "norm.weight"]
    missing = [n for n in ([] if layout.rope else ["pos_embed"]) + needed if n not in weights]
    if missing:
        raise UserError(
            f"{asked} has a class token but lacks {' and '.join(missing)} (as {layout.name} names "
            "them): only plain ViTs with learned positions and a last norm, and DINOv3's, can be "
            "opened."
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
        spec["init_values"] = float(scaled)  # None would be DINOv3's
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
    """Refuse what is said of other weights, and what our transformers cannot be; `usual` is the
    activation they have.
    """
    width, patch = weights["cls_token"].shape[-1], weights[STEM].shape[-2:]
    for word in ("hidden_size", "embed_dim"):
        if about.get(word, width) != width:
            raise UserError(
                f"{asked} is {width} wide, but what is written beside it says {word}="
                f"{about[word]}: it belongs to other weights; remove it."
            )
    act = about.get("hidden_act", usual)
    if isqrt(cells) ** 2 != cells or patch[0] != patch[1] or act != usual:
        raise UserError(
            f"{asked} is no ViT of square patches in a square grid with {usual} ({cells} positions,"
            f" patches of {tuple(patch)}, {act}), and others cannot be opened."
        )


def _num_heads(found: Found, about: dict[str, Any], asked: str) -> int:
    width = found.weights["cls_token"].shape[-1]
    usual = {4096: 32} if found.layout.rope else _HEADS  # DINOv3's 7B
    told = about.get("num_attention_heads") or found.num_heads or usual.get(width)
    if (told is None and width % 64) or not isinstance(told, int | None):
        raise UserError(
            f"{asked}: how many heads a width of {width} has cannot be told from the weights; "
            'write {"num_attention_heads": N} into NAME.json beside the file NAME.'
        )
    return int(told or width // 64)


def _mlp_shape(weights: dict[str, Tensor]) -> tuple[int, bool]:
    """Numbers between an MLP's two layers, and whether as many more gate them."""
    hidden, first = weights["blocks.0.mlp.fc2.weight"].shape[1], "blocks.0.mlp.fc1.weight"
    return hidden, first in weights and weights[first].shape[0] == 2 * hidden
