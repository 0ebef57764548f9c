"""An export prepares images as the run's evaluations do, or says how much otherwise: formats' own
processors are run on pictures, here in this process.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dino_lite.backbones.convnet import ConvNet
from dino_lite.backbones.vit import ViT
from dino_lite.contracts import Backbone, UserError
from dino_lite.data.preprocessing import Preprocessing
from dino_lite.formats.format import Claim, Format
from dino_lite.formats.hf import HuggingFace
from dino_lite.formats.opened import Opened
from dino_lite.formats.publish import publish
from dino_lite.formats.timm import Timm
from dino_lite.formats.verify import Original
from dino_lite.formats.weights import open_weights
from test_publish import RUN, Means, Plain, left, pictures

FORMATS: dict[str, type[Format]] = {"timm": Timm, "hf": HuggingFace}
HOW = Preprocessing((32, 32), (0.5, 0.4, 0.3), (0.2, 0.25, 0.3))
SIZES: dict[str, Any] = {"embed_dim": 24, "depth": 1, "num_heads": 3, "patch_size": 8}
SHAPES = [(50, 40), (37, 39), (41, 90), (200, 71)]  # (37, 39): 7 pixels more than the crop has


def here(name: str, changes: dict[str, dict[str, Any]] | None = None) -> Format:
    """The format `name`, read in this process; `changes` of its JSON files after they are written,
    by the name of the file.
    """

    class Here(FORMATS[name]):  # type: ignore[misc]
        own = True

        def write(self, opened: Opened, folder: Path) -> list[Claim]:
            claims: list[Claim] = super().write(opened, folder)
            for file, values in (changes or {}).items():
                content = json.loads((folder / file).read_text())
                content["pretrained_cfg"] = content.get("pretrained_cfg", {}) | values
                (folder / file).write_text(json.dumps(content | values))
            return claims

    return Here()


def shapes(*sizes: tuple[int, int]) -> list[np.ndarray]:
    """A picture of each size."""
    return [pictures(1, size)[0] for size in sizes]


def vit(how: Preprocessing = HOW) -> Opened:
    """A ViT as a run's."""
    torch.manual_seed(0)
    size = list(how.size)
    return Opened(ViT(**SIZES, image_size=size, in_chans=len(how.mean)).eval(), how, {})


def exported(form: Format, opened: Opened, folder: Path, some: list[np.ndarray]) -> dict[str, Any]:
    """What is found of the pixels."""
    told = publish(form, opened, folder, Original(opened, some))
    (check,) = told["verification"]["pixels"]
    assert isinstance(check, dict)
    return check


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(
    "how",
    [
        HOW,
        HOW._replace(crop=0.9, interpolation="bilinear"),
        HOW._replace(size=(24, 40), crop=1.0),
        HOW._replace(squash=True, interpolation="bilinear", crop=1.0),
        HOW._replace(squash=True, crop=0.8),
        HOW._replace(interpolation="lanczos", crop=0.9, rule="timm"),
        HOW._replace(crop=0.9, rule="hugging_face"),
        HOW._replace(border=True, crop=0.9, rule="timm"),
        HOW._replace(mean=(0.4,), std=(0.3,)),
    ],
)
def test_formats_prepare_images_as_the_run_does(
    name: str, how: Preprocessing, tmp_path: Path
) -> None:
    """Up to rounding, and to a crop that Hugging Face's and timm's rounding puts a pixel off."""
    some = [each[..., : len(how.mean)] for each in shapes(*SHAPES)]
    check = exported(here(name), vit(how), tmp_path / name, some)
    assert check["resized"] == 0
    exact = name == "timm" and how.rule != "hugging_face"
    assert not (exact and check["shifted"])
    assert check["shifted"] or check["levels"] < 1


def test_a_crop_one_pixel_off_is_told(tmp_path: Path) -> None:
    """37 x 39 pixels: seven columns too many, of which Hugging Face cuts three to the left."""
    check = exported(here("hf"), vit(), tmp_path / "hf", shapes((37, 39), (37, 37)))
    assert (check["shifted"], check["resized"]) == (1, 0)
    assert check["levels"] > 1
    assert check["cls"] > 0
    card = (tmp_path / "hf" / "README.md").read_text()
    assert "1 image cropped one pixel off, as this library rounds; the class token then" in card


@pytest.mark.parametrize("name", FORMATS)
def test_images_of_the_size_of_training_stay_as_they_are(name: str, tmp_path: Path) -> None:
    """If all of the data are; if only some, that they are resized is told."""
    some = shapes((32, 32), (32, 32))
    sized = vit()._replace(sized=True)
    assert exported(here(name), sized, tmp_path / "sized", some)["levels"] < 1e-3
    check = exported(here(name), vit(), tmp_path / "mixed", [*some, *shapes((50, 41))])
    assert (check["resized"], check["shifted"]) == (2, 0)
    card = (tmp_path / "mixed" / "README.md").read_text()
    assert "2 images of exactly the size of training resized and cropped" in card
    assert "those of exactly 32 x 32 pixels were left as they are" in card


@pytest.mark.parametrize(
    ("name", "file", "values"),
    [
        ("timm", "config.json", {"mean": [0.0, 0.0, 0.0], "crop_pct": 0.1}),
        ("timm", "config.json", {"mean": [0.45, 0.4, 0.3]}),
        ("timm", "config.json", {"crop_pct": 0.5}),
        ("timm", "config.json", {"std": [float("nan")] * 3}),
        ("hf", "preprocessor_config.json", {"image_std": [0.4, 0.5, 0.6]}),
        ("hf", "preprocessor_config.json", {"do_rescale": False}),
        ("hf", "preprocessor_config.json", {"do_center_crop": False}),
    ],
)
def test_other_preprocessing_is_refused(
    name: str, file: str, values: dict[str, Any], tmp_path: Path
) -> None:
    """Another mean, crop, scale or shape; nothing is left."""
    with pytest.raises(UserError, match=f"format={name} prepares images"):
        exported(here(name, {file: values}), vit(), tmp_path / name, shapes(*SHAPES[:2]))
    assert left(tmp_path) == set()


@pytest.mark.parametrize(
    ("read", "words"),
    [
        ("pixels = torch.zeros(1, 3, 32, 32)", "prepares images otherwise"),
        ("pixels = torch.zeros(1, 3, 32, 40)", r"shape \(1, 3, 32, 40\) instead of \(1, 3, 32, 32"),
        ("none = 0", r"shape \(0,\)"),
        ("raise ValueError('no')", "cannot be read back, preparing an image: ValueError: no"),
    ],
)
def test_lines_of_a_card_that_prepare_no_image_are_refused(
    read: str, words: str, tmp_path: Path
) -> None:
    """Of any format."""
    opened = Opened(Means().eval(), HOW, {})
    with pytest.raises(UserError, match=words):
        exported(Plain(RUN, read=read), opened, tmp_path / "plain", shapes((50, 41)))


def test_images_of_other_channels_are_handed_over_as_arrays(tmp_path: Path) -> None:
    """They have the size of training already."""
    how = HOW._replace(mean=(0.5,) * 5, std=(0.2,) * 5)
    some = [np.concatenate([each, each[..., :2]], axis=2) for each in shapes((50, 41), (32, 32))]
    assert exported(here("timm"), vit(how), tmp_path / "timm", some)["levels"] < 1e-3


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("sized", [True, False])
def test_our_exports_open_with_the_preprocessing_of_the_run(
    name: str, sized: bool, tmp_path: Path
) -> None:
    """Which others' files cannot say; without export.json they are read as others read them."""
    opened = vit()._replace(sized=sized)
    exported(here(name), opened, tmp_path / name, shapes((32, 32) if sized else (50, 41)))
    assert open_weights(tmp_path / name).preprocessing == opened.preprocessing
    for content in ('{"preprocessing": {"size": [8, 8]}}', '{"written_by": "dino_lite 9"}'):
        (tmp_path / name / "export.json").write_text(content)
        found = open_weights(tmp_path / name).preprocessing
        assert (found.rule, found.crop == 1) == ({"hf": "hugging_face"}.get(name, name), sized)


@pytest.mark.parametrize("crop", [0.875, 0.9, 0.96, 1.0, 0.5])
def test_a_size_rounded_down_is_what_it_was(crop: float) -> None:
    """For every square."""
    for side in range(8, 600):
        how = Preprocessing((side, side), crop=crop)
        assert how.always_resized().resized(700, 900) == how.resized(700, 900)


@pytest.mark.parametrize(
    ("backbone", "lines"),
    [
        (lambda: ConvNet("resnet10t"), "These lines need torch, transformers, pillow, timm."),
        (lambda: ViT(**SIZES, image_size=32), "These lines need torch, transformers, pillow."),
    ],
)
def test_cards_tell_the_packages_that_their_lines_need(
    backbone: Any, lines: str, tmp_path: Path
) -> None:
    """Transformers opens convnets through timm."""
    network: Backbone = backbone().eval()
    opened = Opened(network, HOW._replace(size=(32, 32)), {})
    publish(here("hf"), opened, tmp_path / "hf", Original(opened, shapes((50, 41))))
    card = (tmp_path / "hf" / "README.md").read_text()
    assert lines in card
    assert ("timm 1." in card) == ("timm." in lines)


def test_further_files_of_a_graph_are_shown_with_images_of_their_size(tmp_path: Path) -> None:
    """Their lines prepare what they take."""

    class Two(Plain):
        def write(self, opened: Opened, folder: Path) -> list[Claim]:
            (first,) = super().write(opened, folder)
            return [first._replace(title="a"), first._replace(title="b", sizes=((48, 48),))]

    opened = Opened(Means().eval(), HOW, {})
    told = publish(Two(), opened, tmp_path / "two", Original(opened, shapes((50, 41), (90, 80))))
    assert [check["title"] for check in told["verification"]["pixels"]] == ["a", "b"]
    assert max(check["levels"] for check in told["verification"]["pixels"]) < 1e-3
    assert "CenterCrop((48, 48))" in (tmp_path / "two" / "README.md").read_text()
