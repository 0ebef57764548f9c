"""Renames the weights of DINOv3 ViTs from the names of its hub, timm and Hugging Face to ours."""

from __future__ import annotations

import re
from typing import NamedTuple

import torch
from torch import Tensor

_PERIODS = "rope_embed.periods"
BASE = 100.0  # of all DINOv3 models
# Not part of the backbone: the norm of local crops in training, heads of EUPE's distillation.
_LEFT = ("local_cls_norm.", "projectors.")


class Renamed(NamedTuple):
    """Weights by our names, and whose names they had."""

    owner: str
    weights: dict[str, Tensor]
    left: list[str]  # original names of what is not part of the backbone
    num_heads: int | None  # derived from RoPE's periods, if any


def rename(own: dict[str, Tensor]) -> Renamed | None:
    """The weights of a DINOv3 ViT by our names; None if they are of another model."""
    if "pos_embed" in own:
        return None
    if any(".attention.o_proj." in name for name in own):
        return _from_hugging_face(own)
    if "storage_tokens" in own or _PERIODS in own:
        return _from_hub(own)
    if "reg_token" in own and any(name.endswith(".gamma_1") for name in own):
        return _from_timm(own)
    return None


def _from_hub(own: dict[str, Tensor]) -> Renamed:
    """DINOv3's hub: keys have a (masked) bias, gate and value of the MLP are separate layers."""
    weights: dict[str, Tensor] = {}
    left, periods = [], own.get(_PERIODS)
    for name, value in own.items():
        masked = name.endswith("qkv.bias_mask") or (name == _PERIODS and _is_usual(value))
        if masked or name.startswith(_LEFT):
            left.append(name)
        elif name.endswith("qkv.bias"):
            query, key, bias = value.chunk(3)
            weights |= {f"{name[:-4]}q_bias": query, f"{name[:-4]}v_bias": bias}
            mask = own.get(f"{name}_mask")
            if (key if mask is None else key * mask.chunk(3)[1]).any():
                weights[f"{name[:-4]}k_bias"] = key  # no backbone has it, so loading will fail
        else:
            weights["register_tokens" if name == "storage_tokens" else name] = value
    num_heads = None if periods is None else own["cls_token"].shape[-1] // (4 * len(periods))
    return Renamed("DINOv3", _gated(weights, "w1", "w2", "w3"), left, num_heads)


def _is_usual(periods: Tensor) -> bool:
    """Whether `periods` are RoPE's for base 100, up to the rounding of bfloat16."""
    usual = BASE ** (torch.arange(len(periods)) / len(periods))
    return torch.allclose(periods.float(), usual, rtol=2**-7)


def _from_timm(own: dict[str, Tensor]) -> Renamed:
    """timm's Eva: biases are parameters of the attention, scales (gamma_1) of the block."""
    weights = {}
    for name, value in own.items():
        name = re.sub(r"\.attn\.([qv]_bias)$", r".attn.qkv.\1", name)
        name = re.sub(r"\.gamma_([12])$", r".ls\1.gamma", name)
        weights["register_tokens" if name == "reg_token" else name] = value
    return Renamed("timm DINOv3", _gated(weights, "fc1_g", "fc1_x", "fc2"), [], None)


_HF_NAMES = (
    ("embeddings.patch_embeddings.", "patch_embed.proj."),
    ("embeddings.", ""),
    (".attention.o_proj.", ".attn.proj."),
    (".layer_scale1.lambda1", ".ls1.gamma"),
    (".layer_scale2.lambda1", ".ls2.gamma"),
)


def _from_hugging_face(own: dict[str, Tensor]) -> Renamed:
    """transformers' DINOv3ViTModel: queries, keys and values are separate layers."""
    weights: dict[str, Tensor] = {}
    apart: dict[str, dict[str, Tensor]] = {}
    for name, value in own.items():
        name = re.sub(r"^(?:model\.)?layer\.(\d+)\.", r"blocks.\1.", name)
        part = re.fullmatch(r"(.*)\.attention\.([qkv])_proj\.(weight|bias)", name)
        if part is None:
            for theirs, ours in _HF_NAMES:
                name = name.replace(theirs, ours)
            weights[name] = value
        elif part[3] == "weight":
            apart.setdefault(f"{part[1]}.attn.qkv.weight", {})[part[2]] = value
        elif part[2] != "k" or value.any():  # as in _from_hub
            weights[f"{part[1]}.attn.qkv.{part[2]}_bias"] = value
    for name, parts in apart.items():
        if len(parts) == 3:
            weights[name] = torch.cat([parts[which] for which in "qkv"])
    if not own["embeddings.register_tokens"].numel():
        del weights["register_tokens"]
    weights = _gated(weights, "gate_proj", "up_proj", "down_proj")
    return Renamed("Hugging Face DINOv3", weights, [], None)


def _gated(weights: dict[str, Tensor], gate: str, value: str, out: str) -> dict[str, Tensor]:
    """Rename an MLP's layers to ours; gate and value, if it has both, are concatenated."""
    found: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        stem, mlp, rest = name.partition(".mlp.")
        layer, _, kind = rest.partition(".")
        first = f"{stem}.mlp.fc1.{kind}"
        if not mlp or layer not in (gate, value, out):
            found[name] = tensor
        elif layer == out:
            found[f"{stem}.mlp.fc2.{kind}"] = tensor
        elif layer == value:
            other = weights.get(f"{stem}.mlp.{gate}.{kind}")
            found[first] = tensor if other is None else torch.cat([other, tensor])
    return found
