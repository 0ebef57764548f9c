"""Finds the backbone in a file of weights, and reads its spec from their shapes."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dino_lite.backbones.convnet import ConvNet
from dino_lite.backbones.transformer import mlp_of
from dino_lite.contracts import UserError
from dino_lite.formats.convnets import convnet_spec
from dino_lite.formats.dinov3 import DINOV3, META_CONVNEXT, rotation_of
from dino_lite.formats.grids import STEM, Grid, grid_of, told_sizes
from dino_lite.formats.hugging_face import HUGGING_FACE
from dino_lite.formats.hugging_face_convnets import HUGGING_FACE_CONVNETS
from dino_lite.formats.owner import Owner, Read, Tensors
from dino_lite.formats.plain import PLAIN, check_layout
from dino_lite.formats.timm_convnets import TIMM_CONVNETS
from dino_lite.formats.timm_names import EVA, implied
from dino_lite.formats.told import heads_of
from dino_lite.formats.torchvision_convnets import TORCHVISION

LOOKED_FOR = (
    "looked for the class token and blocks of a ViT as dino_lite, DINO, DINOv2, DINOv3, timm and "
    "Hugging Face name them, and for a ResNet or ConvNeXt as torchvision, timm, DINOv3 and Hugging "
    "Face name it, under any prefix"
)
_OTHER_TASKS = ("head.", "head_dist.", "fc_norm.", "fc.", "pooler.", "classifier.")
WRAPPERS = re.compile(r"(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_AVERAGED = re.compile(r"teacher|momentum_backbone|(?:^|[._])ema[._]")
# Heads by width of ViT-H, g and G (Zhai et al. 2022); others have heads of width 64.
_HEADS = {1280: 16, 1408: 16, 1664: 16}

_USUAL_WIDTHS = (192, 384, 768, 1024, 1536, 4096)  # of published ViTs


# In this order: the first that reads the names is the owner.
OWNERS: tuple[Owner, ...] = (
    *(HUGGING_FACE, DINOV3, EVA, PLAIN),
    *(*HUGGING_FACE_CONVNETS, META_CONVNEXT, *TIMM_CONVNETS, *TORCHVISION),
)


class Found(NamedTuple):
    """A backbone found in a file: its weights by our names."""

    read: Read
    prefix: str
    adapted: list[str]  # our names of weights whose values differ from the file's
    grid: Grid | None = None  # of learned positions

    @property
    def weights(self) -> Tensors:
        """By our names."""
        return self.read.weights


def find_backbone(tensors: Tensors, about: dict[str, Any]) -> Found | None:
    """The backbone in `tensors` (the teacher's if there are several), or None.

    `about` is the content of the JSON beside the file. Heads for other tasks are unused; unknown
    names are kept, so that loading them fails.
    """
    plain = {WRAPPERS.sub("", name): name for name in tensors}
    for owner in OWNERS:
        prefixes = [n.removesuffix(owner.anchor) for n in plain if _ends(n, owner.anchor)]
        if not prefixes:
            continue
        prefix = teachers(prefixes)
        taken = [n for n in plain if n.startswith((prefix, owner.bare or prefix))]
        own = {n.removeprefix(prefix): tensors[plain[n]] for n in taken}
        read = owner.read(own, about | {"prefix": prefix})
        if read is not None:
            check_layout(read.owner, about)
            return _found(read, prefix, {plain[n]: n for n in taken}, tensors, about)
    return None


def _found(
    read: Read, prefix: str, taken: dict[str, str], tensors: Tensors, about: dict[str, Any]
) -> Found:
    weights = {n: v for n, v in read.weights.items() if not n.startswith(_OTHER_TASKS)}
    heads = {prefix + name for name in read.weights.keys() - weights.keys()}
    left = heads | {prefix + name for name in read.unused}
    unused = [name for name in tensors if name not in taken or taken[name] in left]
    if read.spec.get("kind") != ConvNet.kind:
        told = implied(weights, about)
        first = told.class_position if read.class_position is None else read.class_position
        num_heads = told.num_heads or read.num_heads
        spec = read.spec | told.spec
        read = read._replace(spec=spec, num_heads=num_heads, class_position=first)
    grid, why = grid_of(weights, about, read.class_position), read.why
    if grid is not None and not grid.with_class:  # timm's ViTs with registers, DeiT III
        none = torch.zeros_like(weights["cls_token"])
        weights["pos_embed"] = torch.cat([none, weights["pos_embed"]], dim=1)
        why = "; ".join(filter(None, (why, grid.doubt)))
    _join_biases(weights)
    if "mask_token" in weights and weights["mask_token"].ndim > 2:
        weights["mask_token"] = weights["mask_token"].reshape(1, -1)
    kept = {id(value) for value in tensors.values()}
    adapted = [name for name, value in weights.items() if id(value) not in kept]
    read = read._replace(weights=weights, unused=unused, why=why)
    return Found(read, prefix, adapted, grid)


def _join_biases(weights: Tensors) -> None:
    """Where keys have a bias, the biases of queries, keys and values become one, as in ViT."""
    if not any(name.endswith("qkv.k_bias") for name in weights):
        return
    for stem in {name[:-6] for name in weights if name.endswith(("qkv.q_bias", "qkv.k_bias"))}:
        own = [weights.pop(f"{stem}{which}_bias", None) for which in "qkv"]
        like = next(bias for bias in own if bias is not None)
        parts = [torch.zeros_like(like) if bias is None else bias for bias in own]
        weights[f"{stem}bias"] = torch.cat(parts)


def own_weights(tensors: Tensors, first: str) -> Found:
    """As `find_backbone`, of a backbone whose names are ours, `first` among them."""
    prefix = teachers([n.removesuffix(first) for n in tensors if n.endswith(first)] or [""])
    weights = {n.removeprefix(prefix): v for n, v in tensors.items() if n.startswith(prefix)}
    unused = [name for name in tensors if not name.startswith(prefix)]
    return Found(Read("dino_lite", "its names are ours", weights, unused, {}), prefix, [])


def teachers(prefixes: list[str]) -> str:
    """The prefix of a teacher's weights if there is one, else the first."""
    return min(prefixes, key=lambda name: not _AVERAGED.search(name))


def _ends(name: str, anchor: str) -> bool:
    return name == anchor or name.endswith(f".{anchor}")


def spec_of(found: Found, about: dict[str, Any], asked: str, **overrides: Any) -> dict[str, Any]:
    """The spec of a backbone from the shapes of its weights, `about` (keys of Hugging Face's
    config.json), and `overrides`; later ones take precedence. `asked` is the prefix of messages:
    "checkpoint=FILE". Raises UserError.
    """
    if found.read.spec.get("kind") == ConvNet.kind:
        return convnet_spec(found.read, about, asked) | overrides
    weights, owner, first = found.weights, found.read.owner, "blocks.0."
    rope = found.read.spec.get("kind") == "rope"
    needed = [STEM, f"{first}attn.qkv.weight", f"{first}mlp.fc2.weight", "norm.weight"]
    missing = [n for n in ([] if rope else ["pos_embed"]) + needed if n not in weights]
    if missing:
        raise UserError(
            f"{asked} has a class token but lacks {' and '.join(missing)} (in {owner}'s "
            "layout): only plain ViTs with learned positions and a last norm, and DINOv3 ViTs, can "
            "be opened."
        )
    width, (hidden, gated) = weights["cls_token"].shape[-1], _mlp_shape(weights)
    # Hugging Face's Dinov2 has SiLU in its gate, whatever its configuration says.
    usual = ("silu",) if rope and gated else ("gelu", "silu") if gated else ("gelu",)
    _check_architecture(found, about, asked, usual)
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
        "norm_eps": about.get("layer_norm_eps", found.read.spec.get("norm_eps")),
        **mlp_of(width, hidden, gated),
    }
    if f"{first}attn.proj.weight" in weights and f"{first}attn.proj.bias" not in weights:
        spec["proj_bias"] = False  # of timm, for all layers but the first
    if rope:
        spec |= {"kind": "rope", "name": "rope", **rotation_of(about, found.read.spec)}
        spec["init_values"] = float(scaled)  # None would mean DINOv3's default
        if f"{first}attn.qkv.bias" in weights:
            spec["key_bias"] = True
    elif found.grid is not None:
        rows, columns = found.grid.rows * patch, found.grid.columns * patch
        spec["image_size"] = rows if rows == columns else [rows, columns]
        spec |= {k: v for k, v in found.read.spec.items() if k.startswith("position_")}
    return spec | overrides


def _check_architecture(
    found: Found, about: dict[str, Any], asked: str, usual: tuple[str, ...]
) -> None:
    """Raise UserError if `about` contradicts the weights, or our transformers do not support the
    architecture; `usual` are names of their activation.
    """
    weights = found.weights
    width, patch = weights["cls_token"].shape[-1], weights[STEM].shape[-2:]
    for word in ("hidden_size", "embed_dim"):
        if about.get(word, width) != width:
            raise UserError(
                f"{asked} has a width of {width}, but the JSON file next to it has {word}="
                f"{about[word]}: it belongs to other weights; remove it."
            )
    act = about.get("hidden_act", usual[0])
    if patch[0] != patch[1] or act not in usual:
        raise UserError(
            f"{asked} is not a ViT with {usual[0]} and square patches (patches of {tuple(patch)}, "
            f"{act}), and others cannot be opened."
        )
    without = [
        layer
        for layer in ("attn.proj", "mlp.fc1", "mlp.fc2")
        if not any(n.startswith("blocks.") and n.endswith(f".{layer}.bias") for n in weights)
    ]
    if 0 < len(without) < 3:
        raise UserError(
            f"{asked}: its layers {', '.join(without)} have no bias, and others of its blocks "
            "have one, which no backbone of dino_lite can have: use it with its own program."
        )
    if "pos_embed" in weights and found.grid is None:
        told = " or ".join(f"{rows}x{columns}" for rows, columns in told_sizes(about))
        raise UserError(
            f"{asked} has {weights['pos_embed'].shape[1]} positions, and their number does not "
            f"tell their grid{f' (it is not that of {told} pixels)' if told else ''}: write "
            '{"image_size": [ROWS, COLUMNS]} of its images into NAME.json next to the file NAME.'
        )


def known_heads(found: Found, about: dict[str, Any], asked: str) -> int | None:
    """The number of heads, if more tells it than the width. Raises UserError."""
    return heads_of(about, asked) or found.read.num_heads


def guessed_heads(found: Found, about: dict[str, Any], asked: str) -> str:
    """A clause on the number of heads if the width alone tells it, and no published ViT has that
    width; else "".
    """
    if "cls_token" not in found.weights or known_heads(found, about, asked) is not None:
        return ""
    width = found.weights["cls_token"].shape[-1]
    if width in {*_HEADS, *_USUAL_WIDTHS}:
        return ""
    return (
        f"num_heads={width // 64} is a guess, heads of width 64: else write "
        '{"num_attention_heads": N} into NAME.json next to the file NAME'
    )


def _num_heads(found: Found, about: dict[str, Any], asked: str) -> int:
    width = found.weights["cls_token"].shape[-1]
    usual = {4096: 32} if found.read.spec.get("kind") == "rope" else _HEADS  # DINOv3's 7B
    told = known_heads(found, about, asked) or usual.get(width)
    if told is None and width % 64:
        raise UserError(
            f"{asked}: the number of heads for a width of {width} cannot be derived from the "
            'weights; write {"num_attention_heads": N} into NAME.json next to the file NAME.'
        )
    return told or width // 64


def _mlp_shape(weights: dict[str, Tensor]) -> tuple[int, bool]:
    """Inputs of an MLP's second layer, and whether the MLP is gated."""
    hidden, first = weights["blocks.0.mlp.fc2.weight"].shape[1], "blocks.0.mlp.fc1.weight"
    return hidden, first in weights and weights[first].shape[0] == 2 * hidden
