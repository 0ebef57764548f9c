"""Hugging Face's transformers: its own models' weights are read, and it reads what we write."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from dino_lite.backbones.rope import RoPEViT
from dino_lite.backbones.vit import ViT
from dino_lite.contracts import UserError
from dino_lite.formats.weights import load_pretrained, open_weights
from test_importers import saved
from test_rope import joined
from test_vit import randomize

SMALL = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "image_size": 32,
    "patch_size": 8,
}
WIDE = {"intermediate_size": 48}
# Name of the model in transformers, its settings, and our name of its layout.
FAMILIES: dict[str, tuple[str, dict[str, Any], str]] = {
    "vit": ("ViTModel", WIDE, "ViT"),
    "vit without biases": ("ViTModel", WIDE | {"qkv_bias": False}, "ViT"),
    "vit classifier": ("ViTForImageClassification", WIDE, "ViT"),
    "vit masked": ("ViTForMaskedImageModeling", WIDE | {"encoder_stride": 8}, "ViT"),
    "msn": ("ViTMSNModel", WIDE, "ViTMSN"),
    "msn classifier": ("ViTMSNForImageClassification", WIDE, "ViTMSN"),
    "mae": ("ViTMAEModel", WIDE | {"mask_ratio": 0.0}, "ViTMAE"),
    "deit": ("DeiTModel", WIDE, "DeiT"),
    "deit classifier": ("DeiTForImageClassificationWithTeacher", WIDE, "DeiT"),
    "dinov2": ("Dinov2Model", {}, "Dinov2"),
    "dinov2 gated": ("Dinov2Model", {"use_swiglu_ffn": True}, "Dinov2"),
    "dinov2 classifier": ("Dinov2ForImageClassification", {}, "Dinov2"),
    "registers": (
        "Dinov2WithRegistersModel",
        {"num_register_tokens": 2, "layer_norm_eps": 1e-3},
        "Dinov2 with registers",
    ),
    "no registers": (
        "Dinov2WithRegistersModel",
        {"num_register_tokens": 0},
        "Dinov2 with registers",
    ),
    "dinov3": ("DINOv3ViTModel", WIDE | {"num_register_tokens": 2, "rope_theta": 50.0}, "DINOv3"),
    "dinov3 gated": (
        "DINOv3ViTModel",
        WIDE | {"use_gated_mlp": True, "hidden_act": "silu", "query_bias": False},
        "DINOv3",
    ),
}
SIZES = ((32, 32), (48, 48), (24, 40))


@cache
def theirs(family: str) -> Any:
    """A model of transformers with generic weights; double precision would be rounded in a file."""
    name, settings, _ = FAMILIES[family]
    family_class: Any = getattr(transformers, name)
    model = family_class(family_class.config_class(**SMALL | settings)).eval()
    randomize(model)
    return model


def tokens_of(model: Any, images: Tensor) -> Tensor:
    """All tokens after the last norm, in double precision; positions are resampled if need be."""
    backbone = getattr(model, model.base_model_prefix, model)
    if model.base_model_prefix == "model":
        backbone = model
    kind = model.config.model_type
    resized = {"interpolate_pos_encoding": True} if kind.startswith(("vit", "deit")) else {}
    if kind == "vit_mae":  # it shuffles patches by their noise even if it masks none
        resized["noise"] = torch.arange(images[0, 0].numel() // 64).expand(len(images), -1)
    with torch.no_grad():
        found: Tensor = backbone.double()(pixel_values=images, **resized).last_hidden_state
    backbone.float()
    return found


def file_of(model: Any, form: str, folder: Path) -> Path:
    """The weights as one of its two ways of saving leaves them."""
    if form == "state_dict":
        return saved(model.state_dict(), folder)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("form", ["state_dict", "save_pretrained"])
@pytest.mark.parametrize("family", FAMILIES)
def test_its_weights_give_its_tokens_at_every_size(
    family: str, form: str, tmp_path: Path
) -> None:
    """By its own rule of positions, to 1e-6 in double precision; a bare file has no config.json."""
    model, (_, settings, layout) = theirs(family), FAMILIES[family]
    path, told = file_of(model, form, tmp_path), {}
    if form == "state_dict":
        told = {"num_heads": 3, "norm_eps": model.config.layer_norm_eps}
        told |= {"rope_base": settings["rope_theta"]} if "rope_theta" in settings else {}
        layout = "ViT" if layout in ("ViTMSN", "ViTMAE") else layout
    opened = open_weights(path, **told)
    assert opened.fit is not None
    assert opened.fit.layout == f"Hugging Face {layout}"
    backbone = opened.backbone.double()
    if isinstance(backbone, RoPEViT):  # theirs computes sines and cosines in single precision
        positions, single = backbone.positions, torch.empty(0)
        backbone.rotation = lambda grid: positions(grid, single)  # type: ignore[method-assign]
    for size in SIZES:
        images = torch.randn(2, 3, *size, dtype=torch.float64)
        with torch.no_grad():
            found, wanted = joined(backbone(images)), tokens_of(model, images)
        scale = wanted.square().mean().sqrt()
        assert ((found - wanted).abs().max() / scale).item() < 1e-6, size
