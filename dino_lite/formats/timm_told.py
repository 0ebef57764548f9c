"""What is told of a model of timm: its architecture, and how it prepares images."""

from __future__ import annotations

import argparse
import functools
import json
import re
from pathlib import Path
from typing import Any

import timm
import torch

from dino_lite.backbones.named import timm_names
from dino_lite.contracts import UserError
from dino_lite.formats.owner import BY_FILE, Tensors
from dino_lite.formats.torchvision_convnets import MODELS

# Arguments of timm.create_model that do more than describe a network.
_NOT_OF_NETWORKS = ("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path")
_MOST_BLOCKS = 256
_VITS = re.compile(r"(vit|deit3?)_\w+_patch\d+")
_HALF = {"mean": [0.5] * 3, "std": [0.5] * 3}  # of most of timm's ViTs


def described(about: dict[str, Any]) -> Any:
    """The timm model that `about` names, without memory for its weights; None if it names none.
    Raises UserError if timm cannot build it.
    """
    name, given = about.get("architecture"), about.get("model_args") or {}
    if name is None:
        return None
    said = f"{about.get('told_by', 'the JSON beside it')} says architecture={str(name)[:80]}"
    base = name.partition(".")[0] if isinstance(name, str) else ""
    if not (re.fullmatch(r"\w+", base, re.ASCII) and timm.is_model(base)):
        raise UserError(
            f"{said}, which timm {timm.__version__} does not have: name one of its models there, "
            "or update timm."
        )
    args = {key: value for key, value in given.items() if key not in _NOT_OF_NETWORKS}
    try:
        if not 0 < args.get("depth", 1) <= _MOST_BLOCKS:
            raise ValueError(f"depth={args['depth']}")
        return _built(base, json.dumps(args))
    except Exception as error:  # arguments of another version of timm, or of another network
        raise UserError(
            f"{said} with model_args={str(given)[:200]}, which timm {timm.__version__} cannot "
            f"build ({' '.join(str(error).split())[:200]}): correct them there, or update timm."
        ) from error


@functools.lru_cache(maxsize=1)  # it is asked for by each owner in turn
def _built(name: str, args: str) -> Any:
    """timm's model, on the meta device; `args` is JSON."""
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        return timm.create_model(name, **json.loads(args) | {"num_classes": 0})


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
    return told | {key: value for key, value in about.items() if value is not None}


def _of_training(values: dict[str, Any]) -> dict[str, Any]:
    args, name = values.get("args"), values.get("arch")
    args = vars(args) if isinstance(args, argparse.Namespace) else args
    args = args if isinstance(args, dict) else {}
    if not isinstance(name, str) or (args.get("model") != name and values.get("version") != 2):
        return {}
    kept = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")
    told = {key: args[key] for key in kept if args.get(key)}  # "" where none was given
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
