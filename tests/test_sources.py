"""Other sources: arrays in memory, what data.root is, and the facts a plan needs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dino_lite.contracts import Splits
from dino_lite.data.auto import open_auto
from dino_lite.data.facts import read_facts
from dino_lite.data.folder import open_folder
from dino_lite.data.sources import ArraySource
from images import fill, sentence


@pytest.mark.slow
def test_auto_without_root_is_the_embedded_set() -> None:
    """The first run needs no data."""
    splits = open_auto()
    assert splits.name == "shapes"
    assert splits.train.labels is not None
    assert open_auto(labels="none").train.labels is None
    assert "data.labels=folder" in sentence(open_auto, labels="folder")


def test_auto_refuses_other_files(tmp_path: Path) -> None:
    """One sentence for a single image, an archive, a thing that is not there."""
    image = fill(tmp_path, "a.png") / "a.png"
    assert "is a file of no known kind" in sentence(open_auto, image)
    assert "does not exist" in sentence(open_auto, tmp_path / "nowhere")


PIXELS = np.random.default_rng(0).integers(0, 256, (6, 5, 4, 3), np.uint8)


def test_array_source_is_shared_with_workers_not_copied() -> None:
    """Its pixels are a tensor, and the digest follows every pixel."""
    source = ArraySource(torch.from_numpy(PIXELS.copy()), None, [], "x")
    before = source.digest()
    source.images[5, 4, 3, 2] ^= 1
    assert source.digest() != before
    assert isinstance(source.images, torch.Tensor)
    assert source.image_size(0) == (5, 4) == source.read(0).shape[:2]


def test_facts(tmp_path: Path) -> None:
    """Counts, and the median size of what can be opened."""
    for i, size in enumerate([(10, 20), (30, 20), (50, 60)]):
        for split in ("train", "val"):
            for name in "ab":
                (tmp_path / split / name).mkdir(parents=True, exist_ok=True)
                Image.new("RGB", size).save(tmp_path / split / name / f"{i}.png")
    (tmp_path / "train" / "a" / "bad.png").write_bytes(b"")
    facts = read_facts(open_folder(tmp_path))
    assert facts[:6] == (7, 6, 2, 20, 30, 3)
    names = ("num_images", "num_test", "num_classes", "height", "width", "channels")
    assert facts._fields == (*names, "mean", "std", "sizes", "warnings")
    assert facts.mean == (0, 0, 0)


def test_facts_know_the_mean_and_deviation_of_each_channel() -> None:
    """In [0, 1], over all pixels looked at."""
    pixels = torch.randint(256, (20, 9, 7, 2), dtype=torch.uint8)
    pixels[..., 1] //= 4
    facts = read_facts(Splits(ArraySource(pixels, None, [], "x"), None, "x"))
    wanted = pixels.double() / 255
    assert facts.channels == 2
    np.testing.assert_allclose(facts.mean, wanted.mean((0, 1, 2)), atol=1e-4)
    np.testing.assert_allclose(facts.std, wanted.std((0, 1, 2), correction=0), atol=1e-4)


def test_facts_look_at_few_of_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """64 headers and images, however many there are."""

    many = ArraySource(torch.zeros(5000, 2, 3, 3, dtype=torch.uint8), None, [], "x")
    looked: list[int] = []
    for what in ("read", "image_size"):
        real = getattr(many, what)
        monkeypatch.setattr(many, what, lambda i, *_, real=real: (looked.append(i), real(i))[1])
    assert read_facts(Splits(many, None, "x")) == (
        5000,
        0,
        0,
        2,
        3,
        3,
        (0, 0, 0),
        (1e-3, 1e-3, 1e-3),
        "3x2 pixels",
        (),
    )
    assert len(looked) == 128
    assert len(set(looked)) == 64


def test_the_one_readable_image_is_found(tmp_path: Path) -> None:
    """Also where it is none of those looked at; without one there is nothing to learn from."""
    for i in range(200):
        (tmp_path / f"{i:03}.jpg").write_bytes(b"no image")
    told = sentence(read_facts, open_folder(tmp_path))
    assert "None of the 200 images can be read" in told
    assert "000.jpg" in told
    fill(tmp_path, "101.png")
    assert read_facts(open_folder(tmp_path))[:5] == (201, 0, 0, 4, 6)


@pytest.mark.parametrize(
    ("sizes", "told"),
    [
        ([(40, 30)] * 2, "40x30 pixels"),
        ([(320, 40), (37, 301), (37, 301)], "37x301 to 320x40 pixels"),
    ],
)
def test_sizes_are_told_as_they_are(
    sizes: list[tuple[int, int]], told: str, tmp_path: Path
) -> None:
    """Medians of width and height need not be the size of any image."""
    for i, size in enumerate(sizes):
        Image.new("RGB", size).save(tmp_path / f"{i}.png")
    assert read_facts(open_folder(tmp_path)).sizes == told
