"""Other sources: CIFAR-10, arrays in memory, what data.root is, and the facts a plan needs."""

from __future__ import annotations

import hashlib
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dino_lite.contracts import Splits
from dino_lite.data.auto import open_auto
from dino_lite.data.builtin import open_cifar10
from dino_lite.data.facts import read_facts
from dino_lite.data.folder import open_folder
from dino_lite.data.sources import ArraySource
from images import classes, fill, sentence


@pytest.fixture
def cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """torchvision's layout with two images a batch, its checksums set to those of these files."""
    torchvision_cifar = pytest.importorskip("torchvision.datasets").CIFAR10
    base = tmp_path / "cifar-10-batches-py"
    base.mkdir()

    def write(name: str, content: dict[str, Any]) -> list[str]:
        (base / name).write_bytes(pickle.dumps(content))
        return [name, hashlib.md5((base / name).read_bytes()).hexdigest()]

    def batch(first: int) -> dict[str, Any]:
        return {
            "data": (np.arange(2 * 3072).reshape(2, 3072) + first).astype(np.uint8),
            "labels": [first, 9],
        }

    trains = [write(f"data_batch_{i + 1}", batch(i)) for i in range(5)]
    tests = [write("test_batch", batch(7))]
    meta = write("batches.meta", {"label_names": [f"class {i}" for i in range(10)]})
    monkeypatch.setattr(torchvision_cifar, "train_list", trains)
    monkeypatch.setattr(torchvision_cifar, "test_list", tests)
    monkeypatch.setattr(
        torchvision_cifar,
        "meta",
        {"filename": meta[0], "key": "label_names", "md5": meta[1]},
    )
    return tmp_path


def test_cifar10_from_torchvisions_files(cifar: Path) -> None:
    """Planes of 1024 become pixels; the folder itself or the one around it may be named."""
    for opened in (
        open_cifar10(cifar),
        open_cifar10(cifar / "cifar-10-batches-py"),
        open_auto(cifar),
        open_auto(cifar / "cifar-10-batches-py"),
    ):
        assert opened.name == "cifar10"
        assert opened.test is not None
        assert (len(opened.train), len(opened.test)) == (10, 2)
        assert classes(opened.train) == [f"class {i}" for i in (0, 9, 1, 9, 2, 9, 3, 9, 4, 9)]
        stored = (np.arange(3072) + 1).astype(np.uint8).reshape(3, 32, 32)
        assert np.array_equal(opened.train.read(2), stored.transpose(1, 2, 0))


def test_cifar10_that_is_not_whole(cifar: Path, tmp_path: Path) -> None:
    """Missing and altered files are refused, the latter before they are unpickled."""
    assert "data.download=true" in sentence(open_cifar10, tmp_path / "elsewhere")
    file = cifar / "cifar-10-batches-py" / "data_batch_3"
    file.write_bytes(file.read_bytes() + b"\0")
    assert "is not whole" in sentence(open_cifar10, cifar)


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
    assert source.size(0) == (5, 4) == source.read(0).shape[:2]


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
    assert facts._fields == (*names, "mean", "std")
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


def test_facts_look_at_few_of_many() -> None:
    """64 headers and images, however many there are."""

    class Counting(ArraySource):
        opened = 0

        def read(self, index: int, min_pixels: int | None = None) -> np.ndarray:
            Counting.opened += 1
            return super().read(index)

        def size(self, index: int) -> tuple[int, int]:
            Counting.opened += 1
            return super().size(index)

    many = Counting(torch.zeros(5000, 2, 3, 3, dtype=torch.uint8), None, [], "x")
    assert read_facts(Splits(many, None, "x")) == (
        5000,
        0,
        0,
        2,
        3,
        3,
        (0, 0, 0),
        (1e-3, 1e-3, 1e-3),
    )
    assert Counting.opened == 128


def test_the_one_readable_image_is_found(tmp_path: Path) -> None:
    """Also where it is none of those looked at; without one there is nothing to learn from."""
    for i in range(200):
        (tmp_path / f"{i:03}.jpg").write_bytes(b"no image")
    told = sentence(read_facts, open_folder(tmp_path))
    assert "None of the 200 images can be read" in told
    assert "000.jpg" in told
    fill(tmp_path, "101.png")
    assert read_facts(open_folder(tmp_path))[:5] == (201, 0, 0, 4, 6)
