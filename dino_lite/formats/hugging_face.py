"""The names of Hugging Face's transformers, versions 4 and 5, for vision transformers."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dino_lite.backbones.rope import RoPEViT
from dino_lite.backbones.vit import ViT
from dino_lite.contracts import UserError
from dino_lite.formats.dinov3 import SPEC
from dino_lite.formats.owner import Owner, Pairs, Read, Tensors, gated_mlp, joined_qkv, renamed


class _Class(NamedTuple):
    """A class of models, and what its configuration has if nothing is said."""

    owner: str  # for messages
    architecture: str
    norm_eps: float
    antialias: bool = False  # how it resamples positions
    num_heads: int = 12


_CLASSES = {  # by model_type
    "vit": _Class("Hugging Face ViT", "ViTModel", 1e-12),
    "vit_msn": _Class("Hugging Face ViTMSN", "ViTMSNModel", 1e-6),
    "vit_mae": _Class("Hugging Face ViTMAE", "ViTMAEModel", 1e-12),
    "deit": _Class("Hugging Face DeiT", "DeiTModel", 1e-12),
    "dinov2": _Class("Hugging Face Dinov2", "Dinov2Model", 1e-6),
    "dinov2_with_registers": _Class(
        "Hugging Face Dinov2 with registers", "Dinov2WithRegistersModel", 1e-6, antialias=True
    ),
    "dinov3_vit": _Class("Hugging Face DINOv3", "DINOv3ViTModel", 1e-5, num_heads=6),
}

# As version 4 has them. Version 5 has them in its files too, but not in the state_dict() of models.
_TOP = (
    ("embeddings.cls_token", "cls_token"),
    ("embeddings.position_embeddings", "pos_embed"),
    ("embeddings.register_tokens", "register_tokens"),
    ("embeddings.mask_token", "mask_token"),
    ("embeddings.patch_embeddings.projection.", "patch_embed.proj."),
    ("layernorm.", "norm."),
)
_TOP_DINOV3 = (*_TOP[:4], ("embeddings.patch_embeddings.", "patch_embed.proj."))
_SCALES = (("layer_scale1.lambda1", "ls1.gamma"), ("layer_scale2.lambda1", "ls2.gamma"))
_VIT = (
    ("layernorm_before.", "norm1."),
    ("layernorm_after.", "norm2."),
    ("attention.output.dense.", "attn.proj."),
    ("intermediate.dense.", "mlp.fc1."),
    ("output.dense.", "mlp.fc2."),
)
_DINOV2 = (("attention.output.dense.", "attn.proj."), *_SCALES)
_GATED = (("mlp.weights_in.", "mlp.fc1."), ("mlp.weights_out.", "mlp.fc2."))
_DINOV3 = (
    ("attention.o_proj.", "attn.proj."),
    *_SCALES,
    ("mlp.up_proj.", "mlp.fc1."),
    ("mlp.down_proj.", "mlp.fc2."),
)
_BLOCK = re.compile(r"(?:encoder\.|model\.)?layers?\.(\d+)\.(.+)")
_QKV = re.compile(
    r"attention\.(?:attention\.)?(query|key|value|q_proj|k_proj|v_proj)\.(weight|bias)"
)


def read(own: Tensors, about: dict[str, Any]) -> Read | None:
    """ViT, ViTMSN, DeiT, Dinov2 (with and without registers) and DINOv3's ViT: queries, keys and
    values are separate layers.
    """
    kind, why = _kind(own, about)
    weights: Tensors = {}
    apart: dict[str, Tensors] = {}
    top = _TOP_DINOV3 if kind == "dinov3_vit" else _TOP
    for name, value in own.items():
        block = _BLOCK.fullmatch(name)
        part = block and _QKV.fullmatch(block[2])
        if block is None:
            weights[renamed(name, top)] = value
        elif part is None:
            ours = renamed(block[2], (*_VIT, *_SCALES, *_GATED, *_DINOV3[:1]))
            weights[f"blocks.{block[1]}.{ours}"] = value
        else:
            layer = f"blocks.{block[1]}.attn.qkv.{part[2]}"
            apart.setdefault(layer, {})[part[1][0]] = value
    if kind == "dinov3_vit":
        for name in [name for name in apart if name.endswith("bias")]:
            weights |= _biases(name.removesuffix("bias"), apart.pop(name))
    weights |= joined_qkv(apart)
    weights = gated_mlp(weights, "gate_proj", "up_proj", "down_proj")
    if kind == "deit":
        _distillation_to_register_(weights)
    if "register_tokens" in weights and not weights["register_tokens"].numel():
        del weights["register_tokens"]
    found = _CLASSES[kind]
    rule = {"position_offset": 0.0, "position_antialias": found.antialias}
    spec = SPEC if kind == "dinov3_vit" else rule | {"norm_eps": found.norm_eps}
    num_heads = found.num_heads if about.get("model_type") == kind else None
    return Read(found.owner, why, weights, [], spec, num_heads)


def _kind(own: Tensors, about: dict[str, Any]) -> tuple[str, str]:
    """The model_type of weights, and how it was told. Raises UserError for that of others."""
    if (told := about.get("model_type")) not in (None, *_CLASSES):
        raise UserError(f"its config.json has model_type={told}, none of {', '.join(_CLASSES)}.")
    if "embeddings.position_embeddings" not in own and "embeddings.patch_embeddings.weight" in own:
        return "dinov3_vit", "it has no position embeddings"
    if "embeddings.distillation_token" in own:
        return "deit", "it has a distillation token, which becomes a register token"
    if "embeddings.register_tokens" in own:
        return "dinov2_with_registers", "it has register tokens"
    if any(name.endswith("layer_scale1.lambda1") for name in own):
        return "dinov2", "it has LayerScale"
    if told in ("vit", "vit_msn", "vit_mae"):
        return told, f"its config.json has model_type={told}"
    others = "ViTMSN, of another norm_eps, and DPT, of other positions, have the same"
    return "vit", f"its names begin with embeddings.; {others}"


def _biases(layer: str, found: dict[str, Tensor]) -> Tensors:
    """DINOv3's biases of queries and values, zero where there is none; of keys unless zero."""
    none = torch.zeros_like(next(iter(found.values())))
    weights = {f"{layer}{word}_bias": found.get(word, none) for word in "qkv"}
    if not weights[f"{layer}k_bias"].any():
        del weights[f"{layer}k_bias"]
    return weights


def _distillation_to_register_(weights: Tensors) -> None:
    """DeiT's distillation token with its position added is a register token, which has none."""
    token, positions = weights.pop("embeddings.distillation_token"), weights.get("pos_embed")
    if positions is not None:
        weights["register_tokens"] = token + positions[:, 1:2]
        weights["pos_embed"] = torch.cat([positions[:, :1], positions[:, 2:]], dim=1)


# Version 5 saves the blocks of ViTMSN's classifier without the prefix of its other weights.
HUGGING_FACE = Owner("embeddings.cls_token", read, bare="encoder.layer.")

# Our names of what every class has, without blocks.N, and of what some have.
_LAYERS = ("patch_embed.proj", "norm1", "norm2", "attn.proj", "mlp.fc1", "mlp.fc2", "norm")
_REQUIRED = {f"{layer}.{kind}" for layer in _LAYERS for kind in ("weight", "bias")} | {
    *("cls_token", "attn.qkv.weight"),
}
_OPTIONAL = {
    *("pos_embed", "mask_token", "register_tokens", "ls1.gamma", "ls2.gamma"),
    *("attn.qkv.bias", "attn.qkv.q_bias", "attn.qkv.v_bias"),
}


def write(
    backbone: ViT | RoPEViT, size: tuple[int, int] | None = None
) -> tuple[Tensors, dict[str, Any]] | None:
    """The weights by the names of the class that computes the same, and the content of its
    config.json; None if no class does.

    Learned positions are written as they are, or, with `size` (rows and columns in pixels),
    resampled to it by the backbone's own rule. Where the class has LayerScale or a mask token and
    the backbone has none, scales are one and the token is zero. ViTModel has no mask token, and its
    pooler returns the class token unchanged.
    """
    kind, width, patch = _kind_of(backbone), backbone.embed_dim, backbone.patch_size
    weights, config = dict(backbone.state_dict()), _config(backbone, kind)
    if not _is_usual(backbone) or config.get("mlp_ratio", 1) is None:
        return None
    if isinstance(backbone, ViT):
        grid = (size[0] // patch, size[1] // patch) if size else backbone.grid
        config["image_size"] = [patch * cells for cells in grid]
        if grid[0] == grid[1]:
            config["image_size"] = patch * grid[0]
        elif kind != "vit":  # takes learned positions for those of a square
            return None
        weights["pos_embed"] = backbone.positions(grid).detach()
    if kind == "vit":
        weights.pop("mask_token", None)
        weights["pooler.dense.weight"] = torch.eye(width)
        weights["pooler.dense.bias"] = torch.zeros(width)
    else:
        scales = [f"blocks.{i}.ls{j}.gamma" for i in range(len(backbone.blocks)) for j in (1, 2)]
        weights = dict.fromkeys(scales, torch.ones(width)) | weights
    if kind in ("dinov2_with_registers", "dinov3_vit"):
        none = {"mask_token": torch.zeros(1, width), "register_tokens": torch.zeros(1, 0, width)}
        weights = none | weights
    if kind == "dinov3_vit":
        weights["mask_token"] = weights["mask_token"][None]
    return _renamed(weights, kind, backbone.blocks[0].mlp.gated), config


def resamples_alike(backbone: ViT | RoPEViT) -> bool:
    """Whether the class that `write` chooses computes the positions of every size as `backbone`."""
    if isinstance(backbone, RoPEViT):
        return True
    rule = (0.0, _CLASSES[_kind_of(backbone)].antialias)
    square = backbone.grid[0] == backbone.grid[1]  # they take any learned grid for one
    return square and (backbone.position_offset, backbone.position_antialias) == rule


def _kind_of(backbone: ViT | RoPEViT) -> str:
    """The model_type that has what the backbone has, and the least besides."""
    if isinstance(backbone, RoPEViT):
        return "dinov3_vit"
    if backbone.num_registers:
        return "dinov2_with_registers"
    gated, names = backbone.blocks[0].mlp.gated, backbone.state_dict()
    return "dinov2" if gated or "blocks.0.ls1.gamma" in names else "vit"


def _is_usual(backbone: ViT | RoPEViT) -> bool:
    """Whether names and activations are those that every class has, and norms have one epsilon."""
    names = {re.sub(r"^blocks\.\d+\.", "", name) for name in backbone.state_dict()}
    norms = [n for block in backbone.blocks for n in (block.norm1, block.norm2)]
    same = all(isinstance(n, nn.LayerNorm) and n.eps == backbone.norm.eps for n in norms)
    mlp, qkv = backbone.blocks[0].mlp, backbone.blocks[0].attn.qkv
    usual = type(mlp.act) is (nn.SiLU if mlp.gated else nn.GELU)
    exact = getattr(mlp.act, "approximate", "none") == "none"
    square = len(qkv.weight) == 3 * backbone.embed_dim
    coordinates = isinstance(backbone, ViT) or backbone.positions.normalizer == "separate"
    shape = square and coordinates and names - _OPTIONAL == _REQUIRED
    return shape and same and usual and exact


def _config(backbone: ViT | RoPEViT, kind: str) -> dict[str, Any]:
    """The content of config.json; its "mlp_ratio" is None if none gives the MLP's width."""
    block, width = backbone.blocks[0], backbone.embed_dim
    hidden, gated = block.mlp.fc2.in_features, block.mlp.gated
    biased = block.attn.qkv.bias is not None
    config: dict[str, Any] = {
        "architectures": [_CLASSES[kind].architecture],
        "model_type": kind,
        "hidden_size": width,
        "num_hidden_layers": len(backbone.blocks),
        "num_attention_heads": block.attn.num_heads,
        "hidden_act": "silu" if gated and kind == "dinov3_vit" else "gelu",
        "layer_norm_eps": backbone.norm.eps,
        "patch_size": backbone.patch_size,
        "num_channels": backbone.in_chans,
    }
    if kind in ("vit", "dinov3_vit"):
        config["intermediate_size"] = hidden
    else:
        ratios = [r for r in range(1, 65) if _hidden(r * width, gated) == hidden]
        config |= {"use_swiglu_ffn": gated, "mlp_ratio": ratios[0] if ratios else None}
    if kind == "vit":
        config["pooler_act"] = "linear"
    if kind == "dinov2":
        config["use_mask_token"] = backbone.mask_token is not None
    if kind in ("dinov2_with_registers", "dinov3_vit"):
        config["num_register_tokens"] = backbone.num_registers
    if not isinstance(backbone, RoPEViT):
        return config | {"qkv_bias": biased}
    where = backbone.positions
    return config | {
        "use_gated_mlp": gated,
        "query_bias": biased,
        "key_bias": biased and isinstance(block.attn.qkv, nn.Linear),
        "value_bias": biased,
        "rope_theta": float(where.base),
        "pos_embed_shift": where.shift or None,
        "pos_embed_jitter": where.jitter if where.jitter > 1 else None,
        "pos_embed_rescale": where.rescale if where.rescale > 1 else None,
    }


def _hidden(width: int, gated: bool) -> int:
    """The width of Dinov2's hidden layer; `width` is that without gate."""
    return (int(width * 2 / 3) + 7) // 8 * 8 if gated else width


def _renamed(weights: Tensors, kind: str, gated: bool) -> Tensors:
    """Our names to theirs, with queries, keys and values in separate layers."""
    top: Pairs = _TOP
    inner: Pairs = _VIT if kind == "vit" else _DINOV2 + _GATED * gated
    stem, attention, words = "encoder.layer", "attention.attention", ("query", "key", "value")
    if kind == "dinov3_vit":
        top, inner, stem, attention = _TOP_DINOV3, _DINOV3, "layer", "attention"
        words = ("q_proj", "k_proj", "v_proj")
    top, inner = (tuple((ours, theirs) for theirs, ours in pairs) for pairs in (top, inner))
    found: Tensors = {}
    for name, value in weights.items():
        if not name.startswith("blocks."):
            found[renamed(name, top)] = value
            continue
        _, i, rest = name.split(".", 2)
        layer, _, each = rest.rpartition(".")
        parts = {renamed(rest, inner): value}
        if layer == "attn.qkv" and each in ("q_bias", "v_bias"):
            parts = {f"{attention}.{each[0]}_proj.bias": value}
        elif layer == "attn.qkv":
            names = [f"{attention}.{word}.{each}" for word in words]
            parts = dict(zip(names, value.chunk(3), strict=True))
        elif layer == "mlp.fc1" and kind == "dinov3_vit" and gated:
            names = [f"mlp.{word}.{each}" for word in ("gate_proj", "up_proj")]
            parts = dict(zip(names, value.chunk(2), strict=True))
        found |= {f"{stem}.{i}.{name}": part for name, part in parts.items()}
    return {name: value.detach().clone().contiguous() for name, value in found.items()}
