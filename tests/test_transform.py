"""Images of any kind as a loaded backbone expects them."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dino_lite import load_backbone
from dino_lite.backbones.vit import ViT
from dino_lite.contracts import UserError
from dino_lite.data.clean import CleanData, Splits
from dino_lite.data.preprocessing import Preprocessing
from dino_lite.data.sources import ArraySource
from dino_lite.data.transform import Transform
from dino_lite.formats.opened import Opened
from dino_lite.formats.safetensors import SafeTensors, open_export

HOW = Preprocessing((24, 16), (0.5, 0.4, 0.3), (0.2, 0.3, 0.4), 0.9, False, "bilinear", rule="timm")


def pixels(*shape: int) -> np.ndarray:
    return np.random.default_rng(len(shape)).integers(0, 256, shape, dtype=np.uint8)


def test_all_kinds_of_one_image_give_the_same(tmp_path: Path) -> None:
    """What evaluations see of it, on the CPU and without gradients; several are one batch."""
    image = pixels(40, 30, 3)
    Image.fromarray(image).save(tmp_path / "a.png")
    source = ArraySource(torch.from_numpy(image[None]), None, (), "one")
    data = CleanData(Splits(source, None, "one"), HOW, 1)
    (wanted, _), *_ = data.batches(source, torch.device("cpu"))
    tensor = torch.from_numpy(image).permute(2, 0, 1)
    kinds = [tmp_path / "a.png", str(tmp_path / "a.png"), Image.fromarray(image), image, tensor]
    transform = Transform(HOW)
    for kind in kinds:
        assert torch.equal(transform(kind), wanted)
    assert torch.equal(transform(kinds), wanted.expand(5, 3, 24, 16))
    assert torch.equal(transform(tensor[None]), wanted)
    assert torch.equal(transform(image[None]), wanted)
    assert not transform(tensor).requires_grad


@pytest.mark.parametrize("mode", ["L", "1", "P", "RGBA", "LA", "CMYK", "I;16", "La", "YCbCr"])
@pytest.mark.parametrize("channels", [3, 1])
def test_what_pillow_opened_is_what_the_file_is(mode: str, channels: int, tmp_path: Path) -> None:
    """Gray, palettes, alpha and 16 bits are decoded by the same rules; made in memory too."""
    image = Image.fromarray(pixels(40, 30, 3))
    if mode == "I;16":
        image = Image.fromarray(pixels(40, 30).astype(np.uint16) * 257)
    else:
        image = image.convert("LA").convert("La") if mode == "La" else image.convert(mode)
    how = Preprocessing((16, 16), *((0.5,) * channels,) * 2)
    suffix = {"CMYK": "tif", "YCbCr": "jpg"}.get(mode, "png")
    if mode != "La":
        image.save(tmp_path / f"a.{suffix}")
        with Image.open(tmp_path / f"a.{suffix}") as opened:
            found = Transform(how)([opened, tmp_path / f"a.{suffix}"])
        assert torch.equal(found[0], found[1])
    if mode != "YCbCr":
        assert Transform(how)(image).shape == (1, channels, 16, 16)


def test_images_are_turned_as_exif_says(tmp_path: Path) -> None:
    """As a path and as Pillow opened it."""
    image = Image.fromarray(pixels(40, 30, 3))
    exif = Image.Exif()
    exif[274] = 6
    image.save(tmp_path / "a.png", exif=exif)
    with Image.open(tmp_path / "a.png") as opened:
        found = Transform(HOW)([tmp_path / "a.png", opened, np.rot90(np.asarray(image), -1)])
    assert torch.equal(found[0], found[2])
    assert torch.equal(found[1], found[2])


def test_arrays_of_other_depths_and_channels() -> None:
    """16 bits are scaled, alpha is dropped, gray is repeated."""
    image, transform = pixels(40, 30, 3), Transform(HOW)
    alpha = np.concatenate([image, pixels(40, 30, 1)], axis=2)
    assert torch.equal(transform(alpha), transform(image))
    assert torch.equal(transform(image.astype(np.uint16) * 257), transform(image))
    gray = pixels(40, 30)
    assert torch.equal(transform(gray), transform(np.stack([gray] * 3, axis=2)))


@pytest.mark.parametrize(
    ("image", "told"),
    [
        (np.zeros((8, 8, 3), np.float32), "image 0 cannot be used: pixels are float32"),
        (np.zeros((8, 8, 5), np.uint8), "image 0 cannot be used: has 5 channels"),
        ("absent.png", "absent.png cannot be used"),
        (3, "image 0 is a int: give paths"),
        ([], "at least one image"),
        ([np.zeros((8, 8, 3), np.uint8), io.BytesIO()], "image 1 is a BytesIO"),
    ],
)
def test_what_is_no_image_is_a_sentence(image: Any, told: str) -> None:
    with pytest.raises(UserError) as caught:
        Transform(HOW)(image)
    assert told in str(caught.value)


def test_an_export_brings_its_transform(tmp_path: Path) -> None:
    """Also one of before, which says size, mean and std alone."""
    backbone = ViT(image_size=16, patch_size=8, embed_dim=16, depth=1, num_heads=2).eval()
    for name in ("new", "old"):
        (tmp_path / name).mkdir()
        SafeTensors().write(Opened(backbone, HOW, {}), tmp_path / name)
    config = json.loads((tmp_path / "old/config.json").read_text())
    config |= {"image_size": 24}
    del config["preprocessing"]
    (tmp_path / "old/config.json").write_text(json.dumps(config))
    image = pixels(40, 30, 3)
    for name, how in {"new": HOW, "old": Preprocessing((24, 24), HOW.mean, HOW.std)}.items():
        assert open_export(tmp_path / name).preprocessing == how
        loaded = load_backbone(tmp_path / name)
        assert torch.equal(loaded.transform(image), Transform(how)(image))
        assert loaded.state_dict().keys() == backbone.state_dict().keys()
