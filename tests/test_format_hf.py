"""Export format `hf`: transformers opens the folder without a word and computes the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from dino_lite.backbones.compact import Compact
from dino_lite.backbones.convnet import ConvNet
from dino_lite.backbones.rope import RoPEViT
from dino_lite.backbones.vit import ViT
from dino_lite.contracts import Backbone, UserError
from dino_lite.data.preprocessing import Preprocessing
from dino_lite.formats.format import Claim
from dino_lite.formats.hf import HuggingFace
from dino_lite.formats.hugging_face import write
from dino_lite.formats.opened import Opened
from dino_lite.formats.verify import sizes_of
from dino_lite.formats.weights import open_weights
from test_transformers import largest
from test_vit import randomize
from zoo import gradient

SIZES: dict[str, Any] = {"embed_dim": 24, "depth": 2, "num_heads": 3, "patch_size": 8}
HERS: dict[str, Any] = {"position_antialias": False}  # how ViTModel and Dinov2Model resample
# Settings of a ViT, or of a rotary one, the class that holds it, and whether at all sizes.
NETWORKS: dict[str, tuple[dict[str, Any], str, bool]] = {
    "plain": ({}, "ViTModel", False),
    "plain, her rule": (HERS, "ViTModel", True),
    "DINO's rule": ({"position_offset": 0.1} | HERS, "ViTModel", False),
    "without biases": ({"qkv_bias": False, "mlp_ratio": 2.5, "norm_eps": 1e-3}, "ViTModel", False),
    "with mask token": ({"mask_token": True, "in_chans": 1}, "ViTModel", False),
    "gated": ({"mlp": "swiglu"} | HERS, "Dinov2Model", True),
    "scaled": ({"init_values": 0.5, "mask_token": True} | HERS, "Dinov2Model", True),
    "scaled, our rule": ({"init_values": 0.5, "mask_token": True}, "Dinov2Model", False),
    "registers": (
        {"num_registers": 2, "init_values": 0.5, "mask_token": True, "mlp": "swiglu"},
        "Dinov2WithRegistersModel",
        True,
    ),
    "registers only": ({"num_registers": 1}, "Dinov2WithRegistersModel", True),
    "rotary": ({"kind": "rope", "mask_token": True}, "DINOv3ViTModel", True),
    "rotary, gated": (
        {"kind": "rope", "qkv_bias": True, "mlp": "swiglu", "mlp_ratio": 2.5, "rope_base": 50.0},
        "DINOv3ViTModel",
        True,
    ),
    "rotary, biased keys": (
        {"kind": "rope", "qkv_bias": True, "key_bias": True},
        "DINOv3ViTModel",
        True,
    ),
    "rotary, unscaled": (
        {"kind": "rope", "init_values": 0.0, "num_registers": 0, "rope_shift": 0.1},
        "DINOv3ViTModel",
        True,
    ),
}
# Those with what the class has: nothing is added, and what comes back is what went out.
SAME = ("plain", "without biases", "scaled", "registers", "rotary")


def network(name: str) -> ViT | RoPEViT:
    """A small one with generic weights, of 32 x 32 pixels."""
    settings = dict(NETWORKS[name][0])
    rotary = settings.pop("kind", "vit") == "rope"
    family: Any = RoPEViT if rotary else ViT
    size = {} if rotary else {"image_size": 32}
    backbone: ViT | RoPEViT = family(**SIZES | size | settings).eval()
    randomize(backbone)
    return backbone


def opened(backbone: Backbone, size: tuple[int, int] = (32, 32), **how: Any) -> Opened:
    """As a run's."""
    values = {"mean": (0.5,) * backbone.in_chans, "std": (0.25,) * backbone.in_chans}
    return Opened(backbone, Preprocessing(size, **values | how), {})


def hold(claim: Claim, folder: Path, backbone: Backbone) -> None:
    """The lines of a claim, loaded once, give the tokens of `backbone` at every size."""
    names: dict[str, Any] = {"folder": str(folder)}
    exec(claim.load, names)
    for size in sizes_of(claim, backbone.patch_size):
        names["pixels"] = torch.randn(2, backbone.in_chans, *size)
        with torch.no_grad():
            wanted = backbone(names["pixels"])
            exec(claim.run, names)
        assert largest(names["cls"], wanted.cls) < 1e-5
        assert largest(names["patches"], wanted.patches) < 1e-5


@pytest.mark.parametrize("name", NETWORKS)
def test_transformers_computes_the_same_at_every_claimed_size(name: str, tmp_path: Path) -> None:
    """In the class that fits, whose weights are all there, and no others."""
    backbone, (_, architecture, everywhere) = network(name), NETWORKS[name]
    (claim,) = HuggingFace().write(opened(backbone), tmp_path)
    model, told = transformers.AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert type(model).__name__ == architecture
    assert not any(told.values()), told
    assert claim.any_size == everywhere
    assert claim.sizes == ((32, 32),)
    hold(claim, tmp_path, backbone)
    pixels = torch.randn(2, backbone.in_chans, 32, 32)
    with torch.no_grad():
        pooled = model(pixel_values=pixels).pooler_output
        torch.testing.assert_close(pooled, backbone(pixels).cls, rtol=1e-4, atol=1e-5)
    if backbone.mask_token is not None and architecture != "ViTModel":
        assert torch.equal(model.embeddings.mask_token.flatten(), backbone.mask_token.flatten())


@pytest.mark.parametrize("name", NETWORKS)
def test_what_is_written_is_read_back(name: str, tmp_path: Path) -> None:
    """To the last bit, besides what the class adds or, in the case of ViTModel, has not."""
    backbone = network(name)
    HuggingFace().write(opened(backbone), tmp_path)
    again = open_weights(tmp_path)
    own, found = backbone.state_dict(), again.backbone.state_dict()
    for key in own.keys() & found.keys():
        assert torch.equal(found[key], own[key]), key
    assert name not in SAME or own.keys() == found.keys()
    assert own.keys() - found.keys() <= {"mask_token"}
    pixels = torch.randn(2, backbone.in_chans, 32, 32)
    with torch.no_grad():
        assert torch.equal(again.backbone(pixels).patches, backbone(pixels).patches)


@pytest.mark.parametrize(
    ("channels", "how"),
    [
        (3, {}),
        (3, {"squash": True, "crop": 1.0, "interpolation": "bilinear"}),
        (1, {"crop": 0.5}),
    ],
)
def test_its_processor_prepares_images_as_we_do(
    channels: int, how: dict[str, Any], tmp_path: Path
) -> None:
    """Resized, cropped and normalized, up to one level of 255 by the rounding of the resize."""
    backbone = ViT(**SIZES, image_size=32, in_chans=channels)
    told = opened(backbone, **how)
    HuggingFace().write(told, tmp_path)
    image = Image.fromarray(gradient(60, 90)).convert("RGB" if channels == 3 else "L")
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    found = processor(image, return_tensors="pt")["pixel_values"]
    side = round(32 / told.preprocessing.crop)
    size = (side, side) if told.preprocessing.squash else (side * 90 // 60, side)
    method = Image.Resampling[told.preprocessing.interpolation.upper()]
    left, top = (size[0] - 32) // 2, (size[1] - 32) // 2
    wanted = image.resize(size, method).crop((left, top, left + 32, top + 32))
    pixels = torch.from_numpy(np.array(wanted)).reshape(32, 32, channels).permute(2, 0, 1)
    assert found.shape == (1, channels, 32, 32)
    assert (found[0] - (pixels / 255 - 0.5) / 0.25).abs().max() * 255 * 0.25 < 1.01


def test_positions_of_the_preprocessings_size_are_stored_where_rules_differ(tmp_path: Path) -> None:
    """Exact there; where rules agree, those that were learned are stored."""
    for name, side in (("plain", 48), ("plain, her rule", 32)):
        backbone = network(name)
        folder = tmp_path / name
        folder.mkdir()
        (claim,) = HuggingFace().write(opened(backbone, (48, 48)), folder)
        assert json.loads((folder / "config.json").read_text())["image_size"] == side
        assert claim.sizes == ((48, 48),)
        hold(claim, folder, backbone)


def test_a_rectangle_is_held_by_the_class_that_takes_it(tmp_path: Path) -> None:
    """ViTModel does; Dinov2Model takes any positions for those of a square."""
    backbone = network("plain")
    (claim,) = HuggingFace().write(opened(backbone, (24, 40)), tmp_path)
    assert claim.sizes == ((24, 40),)
    hold(claim, tmp_path, backbone)
    assert write(network("scaled, our rule"), (24, 40)) is None


@pytest.mark.parametrize(
    "settings",
    [
        {"qk_norm": True},
        {"init_values": 0.5, "mlp_ratio": 2.7},
        {"act_layer": "gelu_tanh"},
        {"norm_layer": "rmsnorm"},
        {"proj_bias": False},
    ],
)
def test_what_no_class_computes_is_not_written(settings: dict[str, Any]) -> None:
    """Norms of queries, fractions of widths, other activations, norms and biases."""
    assert write(ViT(**SIZES, image_size=32, **settings)) is None


@pytest.mark.parametrize(
    "backbone",
    [
        lambda: ConvNet(widths=[8, 16], depths=[1, 1], patch_size=2),
        lambda: Compact(network("plain"), 8),
    ],
)
def test_what_neither_transformers_nor_timm_holds_is_refused(backbone: Any, tmp_path: Path) -> None:
    """In a sentence that names formats which hold it; no file is left."""
    with pytest.raises(UserError, match=r"onnx.*torch_export") as error:
        HuggingFace().write(opened(backbone()), tmp_path)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "backbone",
    [
        lambda: ViT(**SIZES, image_size=[48, 32], qk_norm=True),
        lambda: RoPEViT(**SIZES, rope_normalize_coords="max"),
        lambda: ViT(**SIZES, image_size=32, in_chans=1, init_values=0.5, mlp_ratio=2.7),
        lambda: ViT(**SIZES, image_size=48, position_offset=0.1, qk_norm=True),
        lambda: ConvNet("resnet10t", in_chans=1),
        lambda: ConvNet("convnext_atto", norm="layer"),
    ],
)
def test_other_networks_go_through_timm(backbone: Any, tmp_path: Path) -> None:
    """As the wrapper in transformers opens timm's folder, whose processor is in its config.json."""
    network = backbone().eval()
    size = (64, 64) if isinstance(network, ConvNet) else (48, 32)
    (claim,) = HuggingFace().write(opened(network, size), tmp_path)
    model, told = transformers.AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert type(model).__name__ == "TimmWrapperModel"
    assert not any(told.values()), told
    hold(claim, tmp_path, network)
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    image = Image.fromarray(gradient(60, 90)).convert("L" if network.in_chans == 1 else "RGB")
    found_pixels = processor(image, return_tensors="pt")["pixel_values"]
    assert found_pixels.shape == (1, network.in_chans, *size)
