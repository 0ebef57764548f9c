"""timm's ViTs: their names that differ from those of `plain`, and what architectures imply."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import timm
import torch
from timm.layers.activations import GELU
from timm.layers.mlp import Mlp
from timm.models.eva import Eva
from torch import nn

from dino_lite.backbones.rope import RoPEViT, is_dinov3
from dino_lite.backbones.transformer import is_plain, mlp_of
from dino_lite.backbones.vit import ViT
from dino_lite.contracts import Backbone, UserError
from dino_lite.formats.dinov3 import SPEC
from dino_lite.formats.grids import STEM
from dino_lite.formats.owner import BY_FILE, Owner, Read, Tensors, gated_mlp
from dino_lite.formats.sound import misfit
from dino_lite.formats.timm_told import described

# Base architectures by the epsilon of their norms; all else is said by arguments.
_PLAIN = {1e-6: "vit_base_patch16_224", 1e-5: "vit_base_patch16_clip_224"}
_GATED = {1e-6: "vit_giant_patch14_dinov2"}
_ROPE = {1e-5: "vit_small_patch16_dinov3", 1e-6: "eva02_tiny_patch14_224"}


class Implied(NamedTuple):
    """What an architecture of timm says that shapes do not."""

    spec: dict[str, Any]
    num_heads: int | None = None
    class_position: bool | None = None  # as in Read


def read_eva(own: Tensors, about: dict[str, Any]) -> Read | None:
    """DINOv3 as timm's Eva: biases are parameters of the attention, scales of the block."""
    if "pos_embed" in own:
        return None
    scaled = any(name.endswith((".gamma_1", ".attn.q_bias")) for name in own)
    if scaled and "reg_token" in own:
        why = "its blocks have gamma_1 or q_bias and it has reg_token"
    elif isinstance(described(about), Eva):
        why = "the JSON beside it names an Eva of timm"
    else:
        return None
    return Read("timm DINOv3", why, _ours(own), [], SPEC)


def _ours(own: Tensors) -> Tensors:
    """Weights of timm's VisionTransformer or Eva by our names."""
    weights: Tensors = {}
    for name, value in own.items():
        name = re.sub(r"\.attn\.([qv]_bias)$", r".attn.qkv.\1", name)
        name = re.sub(r"\.gamma_([12])$", r".ls\1.gamma", name)
        weights["register_tokens" if name == "reg_token" else name] = value
    return gated_mlp(weights, "fc1_g", "fc1_x", "fc2")


def implied(weights: Tensors, about: dict[str, Any]) -> Implied:
    """What the architecture named in `about` implies for a transformer's `weights`, by our names.
    Raises UserError if they are not its weights, or our transformers compute something else.
    """
    model = described(about)
    if model is None:
        return Implied({})
    name, by = about["architecture"], about.get("told_by", "the JSON beside it")
    dinov3 = is_dinov3(model)
    if not (is_plain(model) or dinov3):
        raise UserError(
            f"{by} names timm's {name}, which is neither a plain ViT with a class token nor a "
            "DINOv3 ViT, and others cannot be opened."
        )
    if not _has_usual_activation(mlp := model.blocks[0].mlp):
        raise UserError(
            f"{by} names timm's {name} with the activation {type(mlp.act).__name__}, and only ViTs "
            "with GELU, or SiLU in gates, can be opened."
        )
    if not dinov3 and model.num_reg_tokens and not model.no_embed_class:
        raise UserError(
            f"{by} names timm's {name}, whose registers have positions, and others cannot be "
            "opened: use it with timm."
        )
    theirs = _ours(model.state_dict())
    if STEM in weights:  # channels are adapted
        theirs[STEM] = theirs[STEM][:, :1].expand(-1, weights[STEM].shape[1], -1, -1)
    free = ("pos_embed", "mask_token", ".attn.qkv.q_bias", ".attn.qkv.v_bias")
    names = [each for each in [*theirs, *weights] if not each.endswith(free)]
    if differs := misfit(theirs, weights, names):
        remedy = "rename it" if by == BY_FILE else "correct architecture or model_args there"
        raise UserError(f"{by} names timm's {name}, but {differs} there: {remedy}.")
    spec = {"norm_eps": model.norm.eps} | ({"rope_base": model.rope.temperature} if dinov3 else {})
    return Implied(spec, model.blocks[0].attn.num_heads, dinov3 or not model.no_embed_class)


def _has_usual_activation(mlp: Any) -> bool:
    """Whether it is SiLU of a gated MLP, else the exact GELU."""
    act = mlp.act
    if not isinstance(mlp, Mlp):
        return isinstance(act, nn.SiLU)
    return isinstance(act, nn.GELU | GELU) and getattr(act, "approximate", "none") == "none"


def write(
    backbone: Backbone, size: tuple[int, int] | None = None
) -> tuple[Tensors, dict[str, Any]]:
    """Weights of a ViT or RoPEViT by timm's names, and "architecture" and "model_args" of its
    config.json; the positions of a ViT are resampled to images of `size`, if given.

    DINO's position of the class token is added to that token where timm has none (with registers);
    a mask token is left out. Raises UserError if timm has no such network.
    """
    if not isinstance(backbone, ViT | RoPEViT):
        raise UserError(f"timm has no network like {type(backbone).__name__}.")
    weights = {n: v.detach() for n, v in backbone.state_dict().items() if n != "mask_token"}
    block, width = backbone.blocks[0], backbone.embed_dim
    args: dict[str, Any] = {
        **{"patch_size": backbone.patch_size, "in_chans": backbone.in_chans},
        **{"embed_dim": width, "depth": len(backbone.blocks), "num_heads": block.attn.num_heads},
        "mlp_ratio": mlp_of(width, block.mlp.fc2.in_features, False)["mlp_ratio"],
        "qkv_bias": block.attn.qkv.bias is not None,
        "qk_norm": not isinstance(block.attn.q_norm, nn.Identity),
        "init_values": None if isinstance(block.ls1, nn.Identity) else 1e-5,
        "global_pool": "token",
    }
    if isinstance(backbone, ViT):
        weights, bases, own = _as_vit(backbone, weights, size)
    else:
        weights, bases, own = _as_eva(backbone, weights)
    eps = backbone.norm.eps
    base = min(bases, key=lambda known: abs(known - eps))
    if abs(base - eps) > 1e-6:  # an epsilon of 1e-12 differs from 1e-6 by less than rounding
        raise UserError(f"no ViT of timm has norms with an epsilon of {eps:g}.")
    config = {"architecture": bases[base], "model_args": args | own}
    _check(backbone, weights, config)
    return weights, config


def same_at_any_size(backbone: Backbone) -> bool:
    """Whether timm places the patches of images of every size as `backbone` does."""
    if isinstance(backbone, RoPEViT):
        return bool(backbone.positions.normalizer == "separate")
    if isinstance(backbone, ViT):
        return backbone.position_offset == 0 and backbone.position_antialias
    return True


def _as_vit(
    backbone: ViT, weights: Tensors, size: tuple[int, int] | None
) -> tuple[Tensors, dict[float, str], dict[str, Any]]:
    """For timm's VisionTransformer: names, base architectures and its own arguments."""
    gated, patch = backbone.blocks[0].mlp.gated, backbone.patch_size
    grid = backbone.grid if size is None else (size[0] // patch, size[1] // patch)
    weights["pos_embed"] = backbone.positions(grid).detach()
    args: dict[str, Any] = {
        "img_size": [grid[0] * patch, grid[1] * patch],
        "reg_tokens": backbone.num_registers,
        "no_embed_class": backbone.num_registers > 0,
        "proj_bias": backbone.blocks[0].attn.proj.bias is not None,
        "dynamic_img_size": same_at_any_size(backbone),
    }
    if not gated:
        args["pre_norm"] = False
    else:
        hidden = 2 * backbone.blocks[0].mlp.fc2.in_features
        args["mlp_ratio"] = mlp_of(backbone.embed_dim, hidden, False)["mlp_ratio"]
    if backbone.register_tokens is not None:
        weights["reg_token"] = weights.pop("register_tokens")
        positions = weights["pos_embed"]
        weights["cls_token"] = weights["cls_token"] + positions[:, :1]
        weights["pos_embed"] = positions[:, 1:]
    return weights, _GATED if gated else _PLAIN, args


def _as_eva(
    backbone: RoPEViT, weights: Tensors
) -> tuple[Tensors, dict[float, str], dict[str, Any]]:
    """For timm's Eva: names, base architectures and its own arguments."""
    gated, found = backbone.blocks[0].mlp.gated, {}
    for name, value in weights.items():
        name = re.sub(r"\.attn\.qkv\.([qv]_bias)$", r".attn.\1", name)
        name = re.sub(r"\.ls([12])\.gamma$", r".gamma_\1", name)
        stem, first, kind = name.partition(".mlp.fc1.")
        if gated and first:
            found[f"{stem}.mlp.fc1_g.{kind}"], found[f"{stem}.mlp.fc1_x.{kind}"] = value.chunk(2)
        else:
            found["reg_token" if name == "register_tokens" else name] = value
    args = {
        **{"num_reg_tokens": backbone.num_registers, "dynamic_img_size": True},
        **{"use_rot_pos_emb": True, "use_abs_pos_emb": False, "rope_type": "dinov3"},
        **{"rope_rotate_half": True, "rope_temperature": backbone.positions.base},
        **{"swiglu_mlp": gated, "swiglu_align_to": 8 if gated else 0, "use_fc_norm": False},
        # Eva's own attention has no bias of keys.
        "attn_type": "rope" if isinstance(backbone.blocks[0].attn.qkv, nn.Linear) else "eva",
    }
    return found, _ROPE, args


def _check(backbone: Any, weights: Tensors, config: dict[str, Any]) -> None:
    """Raise UserError if timm's model of `config` has other weights or another activation."""
    try:
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            model: Any = timm.create_model(
                config["architecture"], num_classes=0, **config["model_args"]
            )
    except Exception as error:
        raise UserError(f"timm cannot build this network: {error}.") from error
    own, theirs = ({n: v.shape for n, v in w.items()} for w in (weights, model.state_dict()))
    other = [n for n in [*own, *theirs] if own.get(n) != theirs.get(n)]
    acts = [type(each.blocks[0].mlp.act) for each in (backbone, model)]
    if other or not (issubclass(*acts) or issubclass(*acts[::-1])):
        what = other[0] if other else acts[0].__name__
        raise UserError(f"no ViT of timm is like this network ({what} differs).")


EVA = Owner("cls_token", read_eva)
