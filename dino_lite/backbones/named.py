"""Which backbone a timm model's name stands for."""

from __future__ import annotations

import difflib
import functools
import itertools
from typing import Any

import timm
import torch

from dino_lite.backbones.convnet import ConvNet
from dino_lite.backbones.rope import RoPEViT
from dino_lite.backbones.vit import ViT
from dino_lite.contracts import Backbone, UserError

# The file of conf/backbone whose settings a named model shares, by class and settings.
_CHOICES: dict[str, tuple[type[Backbone], dict[str, Any]]] = {
    "auto": (ViT, {}),
    "rope": (RoPEViT, {}),
    "resnet50": (ConvNet, {"norm": "batch"}),
    "convnext_tiny": (ConvNet, {"norm": "layer"}),
}
_MODULES = ("vision_transformer", "deit", "eva", "resnet", "convnext")  # of timm, with most of them
_KINDS = "plain ViTs with a class token, DINOv3's ViTs, ResNets and ConvNeXts"


def timm_names(module: str = "") -> list[str]:
    """Names of timm's models, of all or of a module such as "resnet"."""
    return timm.list_models(module=module)


@functools.cache
def choice_for(name: str) -> str | None:
    """The file of conf/backbone that a timm model's `name` takes the place of in `backbone.name`;
    None if timm has no such model, or it is of another kind. The model is built on the meta device,
    without memory for its weights.
    """
    if "." in name or name not in timm.list_models():
        return None
    for choice, (family, settings) in _CHOICES.items():
        try:
            with torch.device("meta"), torch.random.fork_rng(devices=[]):
                family(name=name, **settings)
        except UserError:
            continue
        return choice
    return None


def explain_name(name: str, known: list[str]) -> str:
    """One sentence for `backbone=name` that is neither one of `known`, the files of conf/backbone,
    nor a supported timm model.
    """
    asked = f"backbone={name}"
    model, _, tag = name.removeprefix("timm:").partition(".")
    if (tag or model != name) and (model in known or choice_for(model)):
        why = f": .{tag} names weights, but a network is chosen without" if tag else ""
        start = "backbone.pretrained=FILE starts from weights in a file"
        return f"{asked}{why}: write backbone={model}; {start}."
    names = [*known, *(name for module in _MODULES for name in timm.list_models(module=module))]
    resembling = [each for each in names if each.startswith(model)]
    resembling += difflib.get_close_matches(model, names, n=8)
    if (family := _family(model)) in map(_family, timm.list_models()):
        resembling = [each for each in resembling if _family(each) == family]
    near = next((each for each in resembling if each in known or choice_for(each)), None)
    hint = f"did you mean {near}?" if near else f"choose one of {', '.join(known)}, or a timm name."
    if near and model not in timm.list_models():
        return f"{asked}: there is no such choice, and no timm model of that name; {hint}"
    return f"{asked}: of timm's models, only {_KINDS} are supported; {hint}"


def _family(name: str) -> str:
    """The letters that a model's name begins with: "swin" of swin_tiny."""
    return "".join(itertools.takewhile(str.isalpha, name))
