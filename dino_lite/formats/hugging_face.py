"""The names of Hugging Face's transformers."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor

from dino_lite.formats.dinov3 import SPEC
from dino_lite.formats.owner import Owner, Read, Tensors, gated_mlp, renamed, separate_qkv

_NAMES = (
    ("embeddings.cls_token", "cls_token"),
    ("embeddings.position_embeddings", "pos_embed"),
    ("embeddings.register_tokens", "register_tokens"),
    ("embeddings.mask_token", "mask_token"),
    ("embeddings.patch_embeddings.projection.", "patch_embed.proj."),
    ("layernorm.", "norm."),
)
_BLOCK = (
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
_DINOV3 = (
    ("embeddings.patch_embeddings.", "patch_embed.proj."),
    ("embeddings.", ""),
    (".attention.o_proj.", ".attn.proj."),
    (".layer_scale1.lambda1", ".ls1.gamma"),
    (".layer_scale2.lambda1", ".ls2.gamma"),
)


def read(own: Tensors, about: dict[str, Any]) -> Read | None:
    """ViT and Dinov2, with and without registers: queries, keys and values are separate layers."""
    if any(".attention.o_proj." in name for name in own):
        return _read_dinov3(own)
    weights: Tensors = {}
    apart: dict[str, dict[str, Tensor]] = {}
    for name, value in own.items():
        block = re.match(r"encoder\.layer\.(\d+)\.(.*)", name)
        if block is None:
            weights[renamed(name, _NAMES)] = value
            continue
        stem = f"blocks.{block[1]}."
        part = re.fullmatch(r"attention\.attention\.(query|key|value)\.(.*)", block[2])
        if part is None:
            weights[stem + renamed(block[2], _BLOCK)] = value
        else:
            apart.setdefault(f"{stem}attn.qkv.{part[2]}", {})[part[1]] = value
    weights |= separate_qkv(apart)
    why = "its names begin with embeddings."
    rules: dict[str, Any] = {"position_offset": 0.0, "position_antialias": False}
    if not any(name.endswith("layer_scale1.lambda1") for name in own):
        return Read("Hugging Face ViT", why, weights, [], rules | {"norm_eps": 1e-12})
    if "register_tokens" not in weights:
        return Read("Hugging Face Dinov2", why, weights, [], rules)
    rules["position_antialias"] = True
    return Read("Hugging Face Dinov2 with registers", why, weights, [], rules)


def _read_dinov3(own: Tensors) -> Read:
    """DINOv3ViTModel."""
    weights: Tensors = {}
    apart: dict[str, dict[str, Tensor]] = {}
    for name, value in own.items():
        name = re.sub(r"^(?:model\.)?layer\.(\d+)\.", r"blocks.\1.", name)
        part = re.fullmatch(r"(.*)\.attention\.([qkv])_proj\.(weight|bias)", name)
        if part is None:
            for theirs, ours in _DINOV3:
                name = name.replace(theirs, ours)
            weights[name] = value
        elif part[3] == "weight":
            apart.setdefault(f"{part[1]}.attn.qkv.weight", {})[part[2]] = value
        elif part[2] != "k" or value.any():  # no backbone has a bias of keys: loading will fail
            weights[f"{part[1]}.attn.qkv.{part[2]}_bias"] = value
    weights |= separate_qkv(apart, ("q", "k", "v"))
    if not own["embeddings.register_tokens"].numel():
        del weights["register_tokens"]
    weights = gated_mlp(weights, "gate_proj", "up_proj", "down_proj")
    return Read("Hugging Face DINOv3", "its attention has o_proj", weights, [], SPEC)


HUGGING_FACE = Owner("embeddings.cls_token", read)
