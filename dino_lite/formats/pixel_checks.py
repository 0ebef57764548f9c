"""Compares the pixels that a written format prepares from image files with the original's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from dino_lite.contracts import UserError
from dino_lite.data.clean import clean, write_png
from dino_lite.data.preprocessing import Preprocessing
from dino_lite.data.transform import Transform

LEVELS = 1.0  # of 255: the mean difference that libraries' rounding of a resized image explains
Picture = UInt8[np.ndarray, "_H _W C"]  # each of its own size


class PixelCheck(NamedTuple):
    """How a claim's lines prepare the pictures.

    `levels` is the mean absolute difference from the original's pixels in the worst picture, in
    levels of 255. Of the pictures that differ by more than rounding, `shifted` are cropped one
    pixel off, and `resized` are resized although they have exactly the size of training. `cls` is
    the largest difference in the original's class tokens that follows, relative to their root mean
    square.
    """

    title: str
    levels: float
    shifted: int
    resized: int
    cls: float


def write_pictures(pictures: Sequence[Picture], how: Preprocessing, folder: Path) -> list[str]:
    """Paths of the pictures as PNG files; with other channels than 1 or 3 of arrays, prepared but
    for their normalization. Those that exist are not written again.
    """
    paths = []
    for number, picture in enumerate(pictures):
        if picture.shape[2] in (1, 3):
            path = folder / f"{number}.png"
            if not path.exists():
                write_png(picture, path)
        else:
            path = folder / f"{number}_{how.pixels}.npy"
            np.save(path, clean(picture, how))
        paths.append(str(path))
    return paths


def compare(
    found: Sequence[Tensor], pictures: Sequence[Picture], how: Preprocessing, named: str
) -> tuple[float, int, int]:
    """`levels`, `shifted` and `resized` of a `PixelCheck`; `found` are batches of one. Raises
    UserError, which begins with `named`, if neither rounding nor one of these explains a picture.
    """
    scale = 255 * torch.tensor(how.std)[:, None, None]
    largest, shifted, resized = 0.0, 0, 0
    for picture, pixels in zip(pictures, found, strict=True):
        own = Transform(how)(picture)
        if pixels.shape != own.shape:
            raise UserError(
                f"{named} prepares images of shape {tuple(pixels.shape)} instead of "
                f"{tuple(own.shape)}: nothing was written."
            )
        levels = float(((pixels - own) * scale).abs().mean())
        if not levels <= LEVELS:
            if _nearly(pixels, own, scale):
                shifted += 1
            elif picture.shape[:2] == how.size and _nearly(
                pixels, Transform(how.always_resized())(picture), scale
            ):
                resized += 1
            else:
                raise UserError(
                    f"{named} prepares images otherwise than the original's evaluations: pixels "
                    f"differ by {levels:.1f} of 255 levels on average, which neither rounding nor "
                    "a crop one pixel off explains, so nothing was written: choose format=[onnx] "
                    "or format=[torch_export]."
                )
        largest = max(largest, levels)
    return largest, shifted, resized


def _nearly(pixels: Float[Tensor, "1 C H W"], own: Float[Tensor, "1 C H W"], scale: Tensor) -> bool:
    """Whether they agree up to rounding if one is moved by at most a pixel per side."""
    rows, columns = own.shape[2:]
    inner = pixels[:, :, 1:-1, 1:-1]
    return any(
        float(((inner - own[:, :, top : rows - 2 + top, left : columns - 2 + left]) * scale)
              .abs().mean()) <= LEVELS
        for top in range(3)
        for left in range(3)
    )  # fmt: skip
