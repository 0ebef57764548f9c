"""timm's models: their names that differ from those of `plain`, and what timm says of a model."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models.eva import Eva
from torch import nn

from dino_lite.backbones.named import timm_names
from dino_lite.backbones.rope import RoPEViT, is_dinov3
from dino_lite.backbones.transformer import is_plain, mlp_of
from dino_lite.backbones.vit import ViT
from dino_lite.contracts import Backbone, UserError
from dino_lite.formats.dinov3 import SPEC
from dino_lite.formats.owner import BY_FILE, Owner, Read, Tensors, gated_mlp
from dino_lite.formats.torchvision_convnets import MODELS

# Arguments of timm.create_model that do more than describe a network.
_NOT_OF_NETWORKS = ("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path")
_VITS = re.compile(r"(vit|deit3?)_\w+_patch\d+")
_HALF = {"mean": [0.5] * 3, "std": [0.5] * 3}  # of most of timm's ViTs
# Base architectures by the epsilon of their norms; all else is said by arguments.
_PLAIN = {1e-6: "vit_base_patch16_224", 1e-5: "vit_base_patch16_clip_224"}
_GATED = {1e-6: "vit_giant_patch14_dinov2"}
_ROPE = {1e-5: "vit_small_patch16_dinov3", 1e-6: "eva02_tiny_patch14_224"}


def read_eva(own: Tensors, about: dict[str, Any]) -> Read | None:
    """DINOv3 as timm's Eva: biases are parameters of the attention, scales of the block."""
    if "pos_embed" in own:
        return None
    scaled = any(name.endswith((".gamma_1", ".attn.q_bias")) for name in own)
    if scaled and "reg_token" in own:
        why = "its blocks have gamma_1 or q_bias and it has reg_token"
    elif isinstance(_described(about), Eva):
        why = "the JSON beside it names an Eva of timm"
    else:
        return None
    weights = {}
    for name, value in own.items():
        name = re.sub(r"\.attn\.([qv]_bias)$", r".attn.qkv.\1", name)
        name = re.sub(r"\.gamma_([12])$", r".ls\1.gamma", name)
        weights["register_tokens" if name == "reg_token" else name] = value
    weights = gated_mlp(weights, "fc1_g", "fc1_x", "fc2")
    told, num_heads = implied(own, about)
    return Read("timm DINOv3", why, weights, [], SPEC | told, num_heads)


def _described(about: dict[str, Any]) -> Any:
    """One block of the timm model that config.json beside a file describes, without memory for its
    weights; None if there is none that timm can build.
    """
    name, given = about.get("architecture"), about.get("model_args") or {}
    if not isinstance(name, str) or not timm.is_model(name.partition(".")[0]):
        return None
    args = {key: value for key, value in given.items() if key not in _NOT_OF_NETWORKS}
    try:
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            return timm.create_model(name, **args | {"num_classes": 0, "depth": 1})
    except Exception:  # arguments of another version of timm, or of another network
        return None


def implied(own: Tensors, about: dict[str, Any]) -> tuple[dict[str, Any], int | None]:
    """Keywords of the spec, and the number of heads, that the architecture named in `about`
    implies. Raises UserError if our transformers compute something else.
    """
    model = _described(about)
    if model is None:
        return {}, None
    act: Any = getattr(getattr(model.blocks[0], "mlp", None), "act", None)
    usual = isinstance(act, nn.SiLU) or (isinstance(act, nn.GELU) and act.approximate == "none")
    if not usual or not (is_plain(model) or is_dinov3(model)):
        raise UserError(
            f"timm's {about['architecture']} is neither a plain ViT with a class token nor a "
            "DINOv3 ViT, and others cannot be opened."
        )
    spec = {"norm_eps": model.norm.eps}
    if is_dinov3(model):
        spec["rope_base"] = model.rope.temperature
    same = own["cls_token"].shape[-1] == model.embed_dim
    return spec, model.blocks[0].attn.num_heads if same else None


def preprocessing_of(own: Tensors, about: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """The preprocessing of a timm model of which `about` says none, by keys of pretrained_cfg, and
    a clause on what is doubtful about it.
    """
    if about.get("pretrained_cfg") or about.keys() & {"mean", "image_mean"}:
        return {}, ""
    if "blocks.0.ls1.gamma" in own or about.get("prefix", "").startswith("model."):
        return {}, ""  # DeiT's and DINOv2's have ImageNet's mean
    return _HALF, (
        "; images are normalized by 0.5, as for most of timm's ViTs: if this one has another mean, "
        'write {"architecture": NAME} into NAME.json next to the file'
    )


def published(name: str) -> dict[str, Any]:
    """timm's pretrained_cfg of the model `name`; empty if it has none."""
    try:
        told: Any = timm.get_pretrained_cfg(name, allow_unregistered=False)
    except (RuntimeError, ValueError):
        return {}
    return told.to_dict() if told else {}


def completed(about: dict[str, Any], values: dict[str, Any], file: Path) -> dict[str, Any]:
    """`about`, the JSON beside `file`, with what else tells a model of timm: the `values` of a
    training checkpoint of timm, else the file's name; and what timm knows of a model by its name.
    """
    told = _of_training(values) or _of_name(file)
    if about.keys() & {"mean", "image_mean"}:
        told.pop("pretrained_cfg", None)
    elif isinstance(name := about.get("architecture"), str) and (known := published(name)):
        told["pretrained_cfg"] = known
    return told | about


def _of_training(values: dict[str, Any]) -> dict[str, Any]:
    args, name = values.get("args"), values.get("arch")
    args = vars(args) if isinstance(args, argparse.Namespace) else args
    args = args if isinstance(args, dict) else {}
    if not isinstance(name, str) or (args.get("model") != name and values.get("version") != 2):
        return {}
    kept = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")
    told = {key: args[key] for key in kept if args.get(key) is not None}
    return {
        **{"architecture": name, "told_by": "timm's training checkpoint"},
        **{"model_args": args.get("model_kwargs") or {}, "image_size": args.get("img_size")},
        "pretrained_cfg": published(name) | told,
    }


def _of_name(file: Path) -> dict[str, Any]:
    name = re.sub(r"(\.(pth?|tar|bin|ckpt|safetensors))+$", "", file.name)
    base, said = name.partition(".")[0], {"architecture": name, "told_by": BY_FILE}
    if name in MODELS:  # torchvision's as well, which prepares images otherwise
        return said
    if base in (*timm_names("resnet"), *timm_names("convnext")):
        told = published(name)
        name = name if told else base
        return said | {"architecture": name, "pretrained_cfg": told or published(base)}
    told = published(name) if _VITS.match(name) else {}
    return said | {"pretrained_cfg": told} if told else {}


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
