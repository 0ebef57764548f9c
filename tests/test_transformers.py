"""Hugging Face's transformers: its own models' weights are read, and it reads what we write."""

from __future__ import annotations

import copy
import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
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
    "dinov3 with biased keys": ("DINOv3ViTModel", WIDE | {"key_bias": True}, "DINOv3"),
    "dinov3 gated": (
        "DINOv3ViTModel",
        WIDE | {"use_gated_mlp": True, "hidden_act": "silu", "query_bias": False},
        "DINOv3",
    ),
}
IMAGES = [torch.randn(2, 3, *size, dtype=torch.float64) for size in ((32, 32), (48, 48), (24, 40))]


@cache
def theirs(family: str) -> tuple[Any, list[Tensor]]:
    """A model of transformers with generic weights, and its tokens of `IMAGES` after the last norm,
    computed in double precision; positions are resampled if need be.
    """
    name, settings, _ = FAMILIES[family]
    family_class: Any = getattr(transformers, name)
    model = family_class(family_class.config_class(**SMALL | settings)).eval()
    randomize(model)
    double = copy.deepcopy(model).double()
    if not isinstance(double, transformers.DINOv3ViTModel):  # its blocks are called model, too
        double = getattr(double, double.base_model_prefix, double)
    resized: dict[str, Any] = {}
    if model.config.model_type.startswith(("vit", "deit")):
        resized["interpolate_pos_encoding"] = True
    tokens = []
    for images in IMAGES:
        if model.config.model_type == "vit_mae":  # shuffles by noise even if it masks nothing
            resized["noise"] = torch.arange(images[0, 0].numel() // 64).expand(len(images), -1)
        with torch.no_grad():
            tokens.append(double(pixel_values=images, **resized).last_hidden_state)
    return model, tokens


def file_of(model: Any, form: str, folder: Path) -> Path:
    """The weights as one of its two ways of saving leaves them."""
    if form == "state_dict":
        return saved(model.state_dict(), folder)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("form", ["state_dict", "save_pretrained"])
@pytest.mark.parametrize("family", FAMILIES)
def test_its_weights_give_its_tokens_at_every_size(family: str, form: str, tmp_path: Path) -> None:
    """By its own rule of positions, to 1e-6 in double precision; a bare file has no config.json."""
    (model, wanted), (_, settings, layout) = theirs(family), FAMILIES[family]
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
    for images, tokens in zip(IMAGES, wanted, strict=True):
        with torch.no_grad():
            assert largest(joined(backbone(images)), tokens) < 1e-6, images.shape


def largest(found: Tensor, wanted: Tensor) -> float:
    """The largest difference, relative to the root mean square of what is wanted."""
    return float((found - wanted).abs().max() / wanted.square().mean().sqrt())


def test_a_folder_of_several_weights_files_is_read_whole(tmp_path: Path) -> None:
    """By its index, safetensors or not; a file that is absent or elsewhere is named."""
    model, _ = theirs("dinov2")
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    index = tmp_path / "model.safetensors.index.json"
    files = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(files) > 2
    for path in (tmp_path, index):
        opened = open_weights(path)
        assert opened.backbone.spec["num_heads"] == 3  # config.json was read
        assert torch.equal(opened.backbone.norm.weight, model.layernorm.weight)
    backbone = ViT(image_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3, init_values=1.0)
    load_pretrained(backbone, tmp_path)
    files[1].unlink()
    with pytest.raises(UserError, match=rf"names {files[1].name}, which is not next to it"):
        open_weights(tmp_path)


def test_several_torch_files_are_read_too(tmp_path: Path) -> None:
    """As version 4 wrote them."""
    weights = list(theirs("vit")[0].state_dict().items())
    parts = {f"pytorch_model-{i}.bin": dict(weights[i::2]) for i in range(2)}
    for name, part in parts.items():
        torch.save(part, tmp_path / name)
    where = {key: name for name, part in parts.items() for key in part}
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": where}))
    (tmp_path / "config.json").write_text(json.dumps({"num_attention_heads": 3}))
    assert open_weights(tmp_path).backbone.embed_dim == 24


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[]", "holds a list, not an object"),
        ("{", "model.safetensors.index.json cannot be read"),
        ('{"weight_map": [3]}', "has no weight_map"),
        ('{"weight_map": {"a": 3}}', "names 3, which is not a .safetensors or .bin file"),
        ('{"weight_map": {"a": "../a.bin"}}', "names '../a.bin', which is not"),
        ('{"weight_map": {"a": "/etc/hosts"}}', "names '/etc/hosts', which is not"),
        ('{"weight_map": {"a": "model.safetensors.index.json"}}', "names 'model.safetensors.index"),
        ('{"weight_map": {}}', "holds no backbone"),
    ],
)
def test_an_index_that_is_none_is_refused(content: str, words: str, tmp_path: Path) -> None:
    """In one sentence; nothing outside of the folder is read."""
    (tmp_path.parent / "a.bin").write_bytes(b"")
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(UserError, match=words) as error:
        open_weights(tmp_path)
    assert "\n" not in str(error.value)


def test_what_its_configuration_leaves_out_has_the_default_of_its_class(tmp_path: Path) -> None:
    """Another epsilon for ViTMSN than for ViT, whose names are the same; twelve heads."""
    config = transformers.ViTMSNConfig(**SMALL | WIDE | {"num_attention_heads": 12})
    save_file(transformers.ViTMSNModel(config).state_dict(), tmp_path / "model.safetensors")
    for kind, eps in (("vit_msn", config.layer_norm_eps), ("vit", 1e-12)):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
        spec = open_weights(tmp_path).backbone.spec
        assert (spec["norm_eps"], spec["num_heads"]) == (eps, 12)
    (tmp_path / "config.json").unlink()
    opened = open_weights(tmp_path, num_heads=12)
    assert "ViTMSN, of another norm_eps, and DPT, of other positions" in opened.notes[0]


def test_a_distillation_token_is_said_to_become_a_register_token(tmp_path: Path) -> None:
    """Registers have no position, so its own is added."""
    opened = open_weights(file_of(theirs("deit")[0], "save_pretrained", tmp_path))
    assert "distillation token, which becomes a register token" in opened.notes[0]
    assert opened.fit is not None
    assert {"register_tokens", "pos_embed"} <= set(opened.fit.adapted)
    assert opened.backbone.num_registers == 1


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("BeitModel", {}),
        ("BeitModel", {"use_absolute_position_embeddings": True}),
        ("YolosModel", {"num_detection_tokens": 9, "image_size": [32, 32]}),
        ("VivitModel", {"num_frames": 2, "tubelet_size": [2, 8, 8]}),
        ("ASTModel", {"max_length": 64}),
        ("IJepaModel", {}),
    ],
)
def test_relatives_that_compute_otherwise_are_refused(
    name: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    """Though names are alike: relative positions, tokens for detection, videos, sound."""
    family_class: Any = getattr(transformers, name)
    model = family_class(family_class.config_class(**SMALL | WIDE | settings))
    for form in ("state_dict", "save_pretrained"):
        with pytest.raises(UserError) as error:
            open_weights(file_of(model, form, tmp_path / form))
        assert "\n" not in str(error.value)
