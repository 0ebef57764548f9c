"""Arrays are taken as they are, and a sentence says why not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dino_lite.data.auto import open_auto
from dino_lite.data.decode import to_channels
from dino_lite.data.npz import open_npz
from dino_lite.wording import count
from images import classes, sentence


def archive(path: Path, **arrays: Any) -> Path:
    """An .npz with the arrays."""
    np.savez(path, **arrays)
    return path


PIXELS = np.random.default_rng(0).integers(0, 256, (6, 5, 4, 3), np.uint8)


def test_npz_with_everything(tmp_path: Path) -> None:
    """Pixels as stored, labels in the order of numbers, not texts; test's own class comes last."""
    path = archive(
        tmp_path / "my set.npz",
        x_train=PIXELS[:4],
        y_train=np.array([[10], [2], [10], [2]], np.uint8),
        x_test=PIXELS[4:],
        y_test=np.array([2, 0]),
        class_names=np.array(["x"], object),  # of no interest, so not unpickled
    )
    splits = open_auto(path)
    assert splits.name == "my set"
    assert np.array_equal(splits.train.read(3), PIXELS[3])
    assert splits.test is not None
    assert splits.train.classes == splits.test.classes == ["2", "10", "0"]
    assert classes(splits.train) == ["10", "2", "10", "2"]
    assert classes(splits.test) == ["2", "0"]
    assert splits.train.name(3) == f"{path}/train[3]"


def test_npz_of_gray_images_alone(tmp_path: Path) -> None:
    """Labels and test are optional, and gray becomes RGB."""
    for i, shape in enumerate([(6, 5, 4), (6, 5, 4, 1)]):
        gray = PIXELS[..., 0].reshape(shape)
        splits = open_npz(archive(tmp_path / f"{i}.npz", x_train=gray))
        assert splits.test is None
        assert splits.train.labels is None
        assert np.array_equal(splits.train.read(1), np.repeat(PIXELS[1, ..., :1], 3, axis=-1))


def test_npz_of_one_class_has_no_labels(tmp_path: Path) -> None:
    """One class tells nothing apart."""
    path = archive(tmp_path / "a.npz", x_train=PIXELS, y_train=np.zeros(6, int))
    assert open_npz(path).train.labels is None


@pytest.mark.parametrize("channels", [1, 3, 2, 5])
def test_npz_of_any_channels(tmp_path: Path, channels: int) -> None:
    """As stored where that is asked for; gray and RGB become each other as in files."""
    many = np.random.default_rng(1).integers(0, 256, (6, 5, 4, channels), np.uint8)
    path = archive(tmp_path / "a.npz", x_train=many, x_test=many[:2])
    splits = open_npz(path, channels)
    assert splits.test is not None
    assert np.array_equal(splits.train.read(3), many[3])
    assert np.array_equal(splits.test.read(1), many[1])
    assert splits.train.read(0).shape == open_auto(path, channels=channels).train.read(0).shape
    splits.train.read(0)[:] = 0  # no warning of torch: the array is a copy of its own
    for other in {1, 3, 4} - {channels}:
        if {other, channels} == {1, 3}:
            assert np.array_equal(open_npz(path, other).train.read(1), to_channels(many[1], other))
        else:
            told = sentence(open_npz, path, other)
            assert f"each image has {count(channels, 'channel')}, not data.channels={other}" in told


@pytest.mark.parametrize(
    ("arrays", "told"),
    [
        ({"images": PIXELS}, "no x_train, but images"),
        ({}, "no x_train, but nothing"),
        ({"x_train": PIXELS / 255}, "float64 of shape (6, 5, 4, 3)"),
        ({"x_train": PIXELS[0, 0]}, "uint8 of shape (4, 3)"),
        ({"x_train": PIXELS.transpose(0, 3, 1, 2)}, "uint8 of shape (6, 3, 5, 4)"),
        ({"x_train": PIXELS[:0]}, "holds no image"),
        ({"x_train": PIXELS, "y_train": np.arange(5)}, "one for each of the 6 images"),
        ({"x_train": PIXELS, "y_train": np.eye(6)}, "float64 of shape (6, 6)"),
        ({"x_train": PIXELS, "x_test": PIXELS[0]}, "x_test"),
        ({"x_train": np.array([{}], object)}, "Object arrays cannot be loaded"),
    ],
)
def test_npz_that_does_not_fit(tmp_path: Path, arrays: dict[str, Any], told: str) -> None:
    """The sentence names the array and what it is."""
    if "x_test" in arrays:
        arrays = {**arrays, "x_test": arrays["x_test"].astype(np.float32)}
    assert told in sentence(open_npz, archive(tmp_path / "a.npz", **arrays))


def test_npz_that_is_none(tmp_path: Path) -> None:
    """Empty, other bytes, cut short, damaged, a lone array, not there, a folder."""
    whole = archive(tmp_path / "whole.npz", x_train=PIXELS).read_bytes()
    np.save(tmp_path / "array.npy", PIXELS)
    lone = (tmp_path / "array.npy").read_bytes()
    spoiled = whole.replace(PIXELS.tobytes()[:50], bytes(50))
    for i, data in enumerate([b"", b"junk" * 9, whole[: len(whole) // 2], spoiled, lone]):
        (tmp_path / f"{i}.npz").write_bytes(data)
        assert f"{i}.npz cannot be read" in sentence(open_npz, tmp_path / f"{i}.npz")
    assert "does not exist" in sentence(open_auto, tmp_path / "gone.npz")
    (tmp_path / "folder.npz").mkdir()
    assert "is a folder" in sentence(open_npz, tmp_path / "folder.npz")
