"""Small natural images for scripts: parts of CIFAR-10 and of caltech101_30, from ../shared."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

SHARED = Path(__file__).resolve().parents[2] / "shared"
PIXELS = 64  # of caltech101_30


def unpack(name: str, target: Path, *options: str) -> None:
    """Unpack a data set of ../shared into a folder."""
    tool = str(SHARED / "tools" / "unpack_data.py")
    subprocess.run([sys.executable, tool, name, target, *options], check=True)


def write_cifar10(work: Path, num_per_class: int) -> None:
    """Write cifar10.npz into `work`, with the first images of train of each class, if missing."""
    if (work / "cifar10.npz").is_file():
        return
    with unpacked(work, "cifar10", "--as", "npz") as folder:
        with np.load(folder / "cifar10.npz") as archive:
            arrays = {key: archive[key] for key in ("x_train", "y_train", "x_test", "y_test")}
        labels = arrays["y_train"]
        kept = [np.flatnonzero(labels == each)[:num_per_class] for each in np.unique(labels)]
        rows = np.sort(np.concatenate(kept))
        arrays |= {key: arrays[key][rows] for key in ("x_train", "y_train")}
        np.savez(work / "cifar10.npz", **arrays)


def write_caltech101_30(work: Path) -> None:
    """Write caltech101_30.npz into `work`, at PIXELS pixels, if missing."""
    if (work / "caltech101_30.npz").is_file():
        return
    with unpacked(work, "caltech101_30") as folder:
        arrays = {}
        for split, name in (("train", "train"), ("val", "test")):
            files = sorted((folder / split).rglob("*.*"))
            arrays[f"x_{name}"] = np.stack([squared(file) for file in files])
            arrays[f"y_{name}"] = np.array([file.parent.name for file in files])
        np.savez(work / "caltech101_30.npz", **arrays)


@contextmanager
def unpacked(work: Path, name: str, *options: str) -> Iterator[Path]:
    """Context with a data set unpacked into a folder in `work`, which is removed."""
    scratch = work / "unpacked"
    shutil.rmtree(scratch, ignore_errors=True)
    unpack(name, scratch, *options)
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch)


def squared(file: Path) -> np.ndarray[Any, Any]:
    """The square in the middle of an image, at PIXELS pixels."""
    with Image.open(file) as image:
        size = (PIXELS, PIXELS)
        return np.asarray(ImageOps.fit(image.convert("RGB"), size, Image.Resampling.BICUBIC))
