"""How others prepare images is read from their JSON: the same pixels as their own code gives."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm.data
import torch
import transformers
from PIL import Image
from torch import Tensor
from transformers import Dinov2Config, Dinov2Model

from dino_lite.backbones.vit import ViT
from dino_lite.contracts import UserError
from dino_lite.data.preprocessing import Preprocessing
from dino_lite.data.transform import Transform
from dino_lite.formats.processors import Prepared, read_preprocessing
from dino_lite.formats.tensors import read_about
from dino_lite.formats.weights import open_weights

OWN = (32, 32)


@pytest.fixture(scope="module")
def photographs(shared: Path) -> list[Image.Image]:
    """Two wide ones and a tall one, as they came from cameras."""
    with zipfile.ZipFile(shared / "data" / "imagenet_fullres_64.zip") as archive:
        names = [name for name in sorted(archive.namelist()) if name.endswith(".JPEG")]
        images = [Image.open(io.BytesIO(archive.read(name))).convert("RGB") for name in names[:12]]
    tall = [image for image in images if image.height > image.width][:1]
    return [image for image in images if image.height < image.width][:2] + tall


@pytest.fixture(scope="module")
def noises() -> list[Image.Image]:
    """Of the size itself, next to it, narrow and small."""
    rng = np.random.default_rng(0)
    sides = ((224, 224), (225, 224), (227, 301), (300, 40), (31, 33))
    return [Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in sides]


def read(about: dict[str, Any], patch_size: int = 1, in_chans: int = 3) -> Prepared:
    size = 32 // patch_size * patch_size
    sizes: dict[str, Any] = {"embed_dim": 8, "depth": 1, "num_heads": 2, "image_size": size}
    with torch.device("meta"):
        backbone = ViT(patch_size=max(patch_size, 8), in_chans=in_chans, **sizes)
    backbone.patch_size = patch_size
    return read_preprocessing(about, None, backbone, OWN, "checkpoint=x")


def levels_off(how: Preprocessing, images: list[Image.Image], theirs: Any) -> float:
    """The largest difference of a pixel, in levels of 255, of the normalized images."""
    ours, scale = Transform(how), 255 * torch.tensor(how.std)[:, None, None]
    worst = 0.0
    for image in images:
        wanted: Tensor = theirs(image)
        assert wanted.shape[-2:] == how.size
        worst = max(worst, float(((ours(image)[0] - wanted) * scale).abs().max()))
    return worst


PROCESSORS: list[tuple[str, dict[str, Any]]] = [
    ("ViT", {}),
    ("ViT", {"size": {"height": 192, "width": 256}, "resample": 3}),
    ("ViT", {"resample": 1, "do_normalize": False}),
    ("ViT", {"resample": 4, "rescale_factor": 1 / 127.5}),
    ("Bit", {}),
    ("Bit", {"size": {"shortest_edge": 256}, "crop_size": {"height": 192, "width": 224}}),
    ("Bit", {"size": {"shortest_edge": 200}}),
    ("DeiT", {}),
    ("CLIP", {"size": {"shortest_edge": 97}, "crop_size": {"height": 96, "width": 96}}),
    ("ConvNext", {"size": {"shortest_edge": 224}}),
    ("ConvNext", {}),
]


@pytest.mark.parametrize(("kind", "settings"), PROCESSORS)
def test_pixels_are_those_of_hugging_faces_processors(
    kind: str,
    settings: dict[str, Any],
    photographs: list[Image.Image],
    noises: list[Image.Image],
    tmp_path: Path,
) -> None:
    """As they save themselves: equal with Pillow, up to two levels with torchvision's resize."""
    pil = getattr(transformers, f"{kind}ImageProcessorPil")(**settings)
    pil.save_pretrained(tmp_path)
    how, notes = read(read_about(tmp_path / "model.safetensors"))
    assert len(notes) == 1

    def by_pil(image: Image.Image) -> Tensor:
        return pil(image, return_tensors="pt")["pixel_values"][0].float()

    assert levels_off(how, photographs + noises, by_pil) < 1e-3
    if settings.get("resample") in (1, 4):
        return
    usual = getattr(transformers, f"{kind}ImageProcessor").from_pretrained(tmp_path)

    def by_tensors(image: Image.Image) -> Tensor:
        return usual(image, return_tensors="pt")["pixel_values"][0]

    enlarged = how.size[0] > min(image.height for image in photographs)  # rounded in between
    assert levels_off(how, photographs, by_tensors) < (8 if enlarged else 2.01)


def test_dinov3s_processor_rounds_to_no_level(photographs: list[Image.Image]) -> None:
    """It resizes floats, so it differs by less than one."""
    usual = transformers.DINOv3ViTImageProcessor()
    how, _ = read(usual.to_dict())
    found = levels_off(how, photographs, lambda i: usual(i, return_tensors="pt")["pixel_values"][0])
    assert 0 < found < 1


TIMM: list[dict[str, Any]] = [
    {"input_size": [3, 224, 224], "crop_pct": 0.9, "interpolation": "bicubic"},
    {"input_size": [3, 96, 96], "interpolation": "lanczos", "mean": [0.5] * 3, "std": [0.25] * 3},
    {"input_size": [3, 384, 384], "crop_pct": 1.0, "crop_mode": "squash"},
    {"input_size": [3, 288, 288], "crop_pct": 0.95, "crop_mode": "border"},
    {"input_size": [3, 192, 224], "crop_pct": 0.9, "interpolation": "bilinear"},
    {"input_size": [3, 192, 224], "crop_pct": 0.9, "crop_mode": "squash"},
    {"input_size": [3, 192, 224], "crop_pct": 1.0, "crop_mode": "border"},
]


@pytest.mark.parametrize("cfg", TIMM)
@pytest.mark.parametrize("flat", [False, True])
def test_pixels_are_those_of_timms_transform(
    cfg: dict[str, Any], flat: bool, photographs: list[Image.Image], noises: list[Image.Image]
) -> None:
    """To the bit, whatever the crop; of config.json, and of one without pretrained_cfg."""
    asked = timm.data.resolve_data_config(pretrained_cfg=cfg)
    theirs = timm.data.create_transform(**asked)
    how, notes = read(cfg if flat else {"architecture": "x", "pretrained_cfg": cfg})
    assert len(notes) == 1
    assert levels_off(how, photographs + noises, theirs) < 1e-3


def test_a_folder_of_hugging_face_is_evaluated_at_the_size_that_it_says(
    photographs: list[Image.Image], tmp_path: Path
) -> None:
    """Its positions are of 56 pixels, its processor crops 28: the same features as theirs."""
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    theirs = Dinov2Model(Dinov2Config(image_size=56, patch_size=14, **sizes)).eval()
    processor = transformers.BitImageProcessorPil(
        size={"shortest_edge": 32}, crop_size={"height": 28, "width": 28}
    )
    theirs.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    opened = open_weights(tmp_path)
    assert opened.preprocessing.size == (28, 28)
    told = "images as BitImageProcessor's JSON says: resized to the shorter side of 32 pixels"
    assert any(note.startswith(told) for note in opened.notes)
    with torch.no_grad():
        pixels = processor(photographs[0], return_tensors="pt")["pixel_values"].float()
        wanted = theirs(pixels).last_hidden_state[:, 0]
        found = opened.backbone(Transform(opened.preprocessing)(photographs[0])).cls
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_older_and_nested_files_are_read(tmp_path: Path) -> None:
    """Feature extractors with integers; processor_config.json goes before the other."""
    old = {"feature_extractor_type": "ViTFeatureExtractor", "size": 96, "resample": 2}
    assert read(old).preprocessing[:1] == ((96, 96),)
    assert read(old).preprocessing.squash
    clip = {"feature_extractor_type": "CLIPFeatureExtractor", "size": 96, "crop_size": 84}
    assert read(clip).preprocessing.resized(200, 100) == (192, 96)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(old))
    nested = {"image_processor": old | {"size": {"height": 64, "width": 64}}}
    (tmp_path / "processor_config.json").write_text(json.dumps(nested))
    assert read(read_about(tmp_path / "model.safetensors")).preprocessing.size == (64, 64)


@pytest.mark.parametrize(
    ("about", "size", "told"),
    [
        (
            {"image_processor_type": "ViTImageProcessor", "do_resize": False},
            (224, 224),
            "do_resize",
        ),
        (
            {"image_processor_type": "BitImageProcessor", "do_center_crop": False},
            (224, 224),
            "shape",
        ),
        (
            {"image_processor_type": "XImageProcessor", "size": {"longest_edge": 9}},
            OWN,
            "size={'longest_edge': 9} is not followed",
        ),
        ({"pretrained_cfg": {"interpolation": "random"}}, OWN, "interpolation=random is not"),
        (
            {"pretrained_cfg": {"input_size": [3, 64, 64], "fixed_input_size": True}},
            OWN,
            "input_size 64 is not followed",
        ),
        (
            {"pretrained_cfg": {"input_size": [3, 30, 45]}},
            (28, 42),
            "no multiple of the patch size",
        ),
    ],
)
def test_what_is_not_followed_is_said(
    about: dict[str, Any], size: tuple[int, int], told: str
) -> None:
    """In a clause of its own."""
    how, notes = read(about, patch_size=14 if size == (28, 42) else 8)
    assert (how.size, len(notes)) == (size, 2)
    assert told in notes[1]


@pytest.mark.parametrize(
    "about",
    [
        {"pretrained_cfg": {"input_size": [3, "wide"]}},
        {"pretrained_cfg": {"crop_pct": -1}},
        {"pretrained_cfg": {"crop_pct": 1e-9}},
        {"pretrained_cfg": {"crop_pct": 5}},
        {"pretrained_cfg": {"input_size": [3, 16000, 16000], "crop_pct": 0.5}},
        {"image_processor_type": "BitImageProcessor", "size": {"shortest_edge": 9000}},
        {"pretrained_cfg": [1]},
        {"preprocessing": [1]},
        {"preprocessing": {"size": [32, 32], "crop": 1e-3}},
        {"preprocessing": {"size": [32, 32, 32]}},
        {"preprocessing": {"size": [True, True]}},
        {"preprocessing": {"size": 32}},
        {"preprocessing": {"size": [32, 32], "mean": [1e308] * 3}},
        {"preprocessing": {"size": [32, 32], "std": [1e-320] * 3}},
        {"preprocessing": {"size": [32, 32], "mean": ["1", "2", "3"]}},
        {"preprocessing": {"size": [32, 32], "squash": "no"}},
        {"preprocessing": {"size": [32, 32], "crop": "1"}},
        {"preprocessing": {"size": [32, 32], "crop": True}},
        {"pretrained_cfg": {"std": [0, 0, 0]}},
        {"pretrained_cfg": {"input_size": [3, 10**9, 10**9]}},
        {"image_processor_type": "ViTImageProcessor", "image_mean": "half"},
        {"preprocessing": {"size": [8, 8], "rule": "mine"}},
        {"preprocessing": {"sides": 8}},
        {"mean": [float("nan")] * 3},
    ],
)
def test_nonsense_is_a_sentence(about: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"checkpoint=x: how images are prepared .* correct it"):
        read(about)


def test_without_a_word_it_is_the_published_protocol() -> None:
    """At the size of the weights; mean and std alone change nothing else."""
    assert read({}) == Prepared(Preprocessing(OWN))
    gray = read({"image_mean": [0.2, 0.4, 0.6], "image_std": [0.1] * 3}, in_chans=1).preprocessing
    assert (gray.geometry, gray.mean) == ((), pytest.approx((0.4,)))


def test_another_size_keeps_the_crop_and_how_it_is_resized() -> None:
    """As `image_size=` asks for it."""
    how = read({"pretrained_cfg": {"crop_pct": 0.9, "interpolation": "bilinear"}}).preprocessing
    large = how.at(448)
    assert (large.resized(500, 700), large.interpolation) == ((497, 695), "bilinear")
