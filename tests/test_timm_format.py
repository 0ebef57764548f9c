"""Format timm, and names of other programs written and read again: their tokens are ours."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModel

from dino_lite.backbones.compact import Compact
from dino_lite.backbones.convnet import ConvNet
from dino_lite.backbones.rope import RoPEViT
from dino_lite.backbones.spec import build_backbone
from dino_lite.backbones.vit import ViT
from dino_lite.contracts import Backbone, UserError
from dino_lite.data.preprocessing import Preprocessing
from dino_lite.formats import dinov3, plain
from dino_lite.formats.opened import Opened
from dino_lite.formats.timm import Timm
from dino_lite.formats.verify import sizes_of
from dino_lite.formats.weights import open_weights
from test_importers import saved, with_config
from test_vit import images, randomize

SIZES: dict[str, Any] = {"embed_dim": 24, "depth": 2, "num_heads": 2, "patch_size": 8}
OLD_RULE: dict[str, Any] = {"position_offset": 0.1, "position_antialias": False}
BACKBONES: dict[str, Callable[[], Backbone]] = {
    "ViT": lambda: ViT(image_size=32, **SIZES),
    "oblong": lambda: ViT(image_size=[32, 48], **SIZES, mask_token=True, in_chans=1),
    "DINO's rule": lambda: ViT(image_size=24, **SIZES, **OLD_RULE),
    "registers and SwiGLU": lambda: ViT(
        image_size=32, **SIZES, num_registers=2, mlp="swiglu", init_values=1.0, mask_token=True
    ),
    "DINOv2": lambda: ViT(
        image_size=32, **SIZES, **OLD_RULE, init_values=1.0, mask_token=True, mlp_ratio=2.7
    ),
    "norms": lambda: ViT(image_size=32, **SIZES, qk_norm=True, qkv_bias=False, norm_eps=1e-5),
    "Hugging Face's epsilon": lambda: ViT(image_size=32, **SIZES, norm_eps=1e-12),
    "rope": lambda: RoPEViT(**SIZES, mask_token=True),
    "rope, gated": lambda: RoPEViT(**SIZES, mlp="swiglu", qkv_bias=True, rope_base=50.0),
    "rope, bare": lambda: RoPEViT(**SIZES, num_registers=0, init_values=0.0, norm_eps=1e-6),
    "rope, keys": lambda: RoPEViT(**SIZES, qkv_bias=True, key_bias=True),
    "rope, norms": lambda: RoPEViT(**SIZES, qkv_bias=True, qk_norm=True),
    "rope by the larger side": lambda: RoPEViT(**SIZES, rope_normalize_coords="max"),
}
ONE_SIZE = ("DINO's rule", "DINOv2", "rope by the larger side")


def opened(backbone: Backbone, size: tuple[int, int] = (32, 32)) -> Opened:
    """As the export command has it."""
    randomize(backbone)
    stats = ((0.5,) * backbone.in_chans, (0.25,) * backbone.in_chans)
    return Opened(backbone.eval(), Preprocessing(size, *stats, interpolation="bilinear"), {})


def pixels(backbone: Backbone, size: tuple[int, int]) -> Tensor:
    """Two float32 images."""
    return images(*size)[:, : backbone.in_chans].float()


@pytest.mark.parametrize("name", BACKBONES)
def test_timm_and_transformers_read_the_folder(name: str, tmp_path: Path) -> None:
    """The claimed lines give our tokens at every claimed size, and so does transformers' wrapper;
    other sizes are claimed where the rules agree.
    """
    size = (32, 48) if name == "oblong" else (32, 32)
    source = opened(BACKBONES[name](), size)
    backbone = source.backbone
    (claim,) = Timm().write(source, tmp_path)
    assert claim.sizes == (size,)
    assert claim.any_size == (name not in ONE_SIZE)
    about = json.loads((tmp_path / "config.json").read_text())
    assert (about["num_classes"], "num_classes" in about["model_args"]) == (0, False)
    cfg = about["pretrained_cfg"]
    assert cfg["input_size"] == [backbone.in_chans, *size]
    assert cfg["mean"] == [0.5] * backbone.in_chans
    assert [int(side / cfg["crop_pct"]) for side in size] == [round(side / 0.875) for side in size]
    assert (cfg["interpolation"], cfg["crop_mode"]) == ("bilinear", "center")
    known: dict[str, Any] = {"folder": str(tmp_path)}
    exec(claim.load, known)
    wrapped: Any = AutoModel.from_pretrained(tmp_path)
    with torch.no_grad():
        for each in sizes_of(claim, backbone.patch_size):
            x = pixels(backbone, each)
            wanted = backbone(x)
            exec(claim.run, known | (found := {"pixels": x, "model": known["model"]}), found)
            torch.testing.assert_close(found["cls"], wanted.cls, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(found["patches"], wanted.patches, rtol=1e-4, atol=1e-4)
            output = wrapped(pixel_values=x)
            torch.testing.assert_close(output.pooler_output, wanted.cls, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", BACKBONES)
def test_what_timm_reads_opens_here_again(name: str, tmp_path: Path) -> None:
    """Equal tokens, sizes, normalization, from the folder alone."""
    size = (32, 48) if name == "oblong" else (32, 32)
    source = opened(BACKBONES[name](), size)
    Timm().write(source, tmp_path)
    again = open_weights(tmp_path)
    assert again.preprocessing.size == size
    assert again.mean == source.mean
    for each in (size, (24, 40)):
        x = pixels(source.backbone, each)
        found, wanted = again.backbone(x), source.backbone(x)
        if each == size or name not in ONE_SIZE:
            torch.testing.assert_close(found.cls, wanted.cls, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(found.patches, wanted.patches, rtol=1e-4, atol=1e-4)


ODD: dict[str, tuple[Callable[[], Backbone], str]] = {
    "small convnet": (lambda: ConvNet(name="resnet", widths=[8], depths=[1]), "small convnet"),
    "compact": (lambda: Compact(ViT(image_size=32, **SIZES), 4), "reduced by compact=4: timm"),
    "norms": (lambda: ViT(image_size=32, **SIZES, norm_eps=1e-3), "epsilon of 0.001"),
    "activation": (lambda: ViT(image_size=32, **SIZES, act_layer="relu"), "ReLU"),
}


@pytest.mark.parametrize("name", ODD)
def test_what_timm_lacks_is_refused_with_what_has_it(name: str, tmp_path: Path) -> None:
    """One sentence that names other formats; nothing is written."""
    make, words = ODD[name]
    with pytest.raises(UserError, match=rf"^format=timm.*{words}.*format=onnx or format=torch_exp"):
        Timm().write(opened(make()), tmp_path)
    assert [*tmp_path.iterdir()] == []


WRITTEN: dict[str, tuple[str, Callable[[Backbone], Any]]] = {
    "DINO": ("DINO's rule", plain.write_dino),
    "DINOv2": ("DINOv2", plain.write_dinov2),
    "DINOv2 with registers": ("registers and SwiGLU", plain.write_dinov2),
    "DINOv3": ("rope, gated", dinov3.write),
    "DINOv3, plain": ("rope", dinov3.write),
    "DINOv3, keys": ("rope, keys", dinov3.write),
    "DINOv3, oblong": ("rope by the larger side", dinov3.write),
}


@pytest.mark.parametrize("form", WRITTEN)
def test_names_of_hubs_are_read_as_they_were_written(form: str, tmp_path: Path) -> None:
    """The owner is told, and tokens are equal at every size, in float64."""
    name, write = WRITTEN[form]
    source = BACKBONES[name]()
    randomize(source)
    written = write(source.double().eval())
    weights, about = written if isinstance(written, tuple) else (written, {})
    path = with_config(saved(weights, tmp_path), **about)
    again = open_weights(path, num_heads=2)
    assert again.fit is not None
    assert again.fit.layout == form.partition(",")[0]
    twin = build_backbone(again.backbone.spec | {"kind": again.backbone.kind}).double().eval()
    twin.load_state_dict({n: v.double() for n, v in again.backbone.state_dict().items()})
    x = images(24, 40)
    torch.testing.assert_close(twin(x).patches, source(x).patches, rtol=1e-5, atol=1e-5)


def test_names_of_hubs_that_lack_a_part_are_refused() -> None:
    """Each in a sentence that names another owner."""
    for write, name, words in (
        (plain.write_dino, "DINOv2", r"DINO's ViTs have no blocks\.0\.ls1\.gamma: choose DINOv2"),
        (plain.write_dino, "rope", "DINO has no RoPEViT: choose DINOv3's"),
        (plain.write_dinov2, "ViT", "DINOv2's ViTs have LayerScale"),
        (dinov3.write, "ViT", "rotary positions and registers"),
        (dinov3.write, "rope, norms", "no norms of queries"),
    ):
        with pytest.raises(UserError, match=words):
            write(BACKBONES[name]())
