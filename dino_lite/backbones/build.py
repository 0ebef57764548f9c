"""A backbone from its spec, and from a configuration that may name weights to start from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

from torch import nn

from dino_lite.backbones.convnet import ConvNet
from dino_lite.backbones.rope import RoPEViT
from dino_lite.backbones.vit import ViT
from dino_lite.backbones.weights import load_pretrained
from dino_lite.settings.kinds import KeywordsOf


def vit(pretrained: str | None = None, **spec: Annotated[Any, KeywordsOf(ViT)]) -> ViT:
    """A vision transformer, filled with the weights in `pretrained` where that is given."""
    backbone = ViT(**spec)
    if pretrained:
        load_pretrained(backbone, pretrained)
    return backbone


def rope(pretrained: str | None = None, **spec: Annotated[Any, KeywordsOf(RoPEViT)]) -> RoPEViT:
    """DINOv3's vision transformer, filled with the weights in `pretrained` where that is given."""
    backbone = RoPEViT(**spec)
    if pretrained:
        load_pretrained(backbone, pretrained)
    return backbone


# By `kind` in a backbone's spec; a spec without one is a ViT's.
_KINDS: dict[str, Callable[..., nn.Module]] = {"vit": ViT, "rope": RoPEViT, "convnet": ConvNet}


def build_backbone(spec: dict[str, Any]) -> nn.Module:
    """The backbone that `spec` (a Backbone's own, plain JSON) describes, with fresh weights."""
    keywords = dict(spec)
    return _KINDS[keywords.pop("kind", "vit")](**keywords)
