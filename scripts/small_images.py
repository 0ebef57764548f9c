"""Small natural images for scripts: parts of CIFAR-10 and of caltech101_30, from ../shared."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

SHARED = Path(__file__).resolve().parents[2] / "shared"
NUM_PER_CLASS = 1000  # training images of CIFAR-10
PIXELS = 64  # of caltech101_30


def write_data(work: Path) -> None:
    """Write the images of both data sets into `work`, as arrays of one size."""
    unpack = [sys.executable, str(SHARED / "tools" / "unpack_data.py")]
    scratch = work / "unpacked"
    shutil.rmtree(scratch, ignore_errors=True)
    if not (work / "cifar10.npz").is_file():
        subprocess.run([*unpack, "cifar10", scratch, "--as", "npz"], check=True)
        with np.load(scratch / "cifar10.npz") as archive:
            arrays = {key: archive[key] for key in ("x_train", "y_train", "x_test", "y_test")}
        labels = arrays["y_train"]
        kept = [np.flatnonzero(labels == each)[:NUM_PER_CLASS] for each in np.unique(labels)]
        rows = np.sort(np.concatenate(kept))
        arrays |= {key: arrays[key][rows] for key in ("x_train", "y_train")}
        np.savez(work / "cifar10.npz", **arrays)
        shutil.rmtree(scratch)
    if not (work / "caltech101_30.npz").is_file():
        subprocess.run([*unpack, "caltech101_30", scratch], check=True)
        arrays = {}
        for split, name in (("train", "train"), ("val", "test")):
            files = sorted((scratch / split).rglob("*.*"))
            arrays[f"x_{name}"] = np.stack([squared(file) for file in files])
            arrays[f"y_{name}"] = np.array([file.parent.name for file in files])
        np.savez(work / "caltech101_30.npz", **arrays)
        shutil.rmtree(scratch)


def squared(file: Path) -> np.ndarray[Any, Any]:
    """The square in the middle of an image, at PIXELS pixels."""
    with Image.open(file) as image:
        size = (PIXELS, PIXELS)
        return np.asarray(ImageOps.fit(image.convert("RGB"), size, Image.Resampling.BICUBIC))
