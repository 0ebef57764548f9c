"""How a photograph becomes the input of a network at evaluation: size, crop and normalization."""

from __future__ import annotations

from typing import Literal, NamedTuple

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos"]


class Preprocessing(NamedTuple):
    """Resize the shorter side to size / `crop` (rounded), crop the center, scale pixels to [0, 1],
    normalize. With `squash`, resize to size / `crop` without keeping the aspect ratio.

    `size` is (rows, columns) in pixels; `mean` and `std` have one value per channel. The default
    `crop` is the published protocol, 256 to 224 pixels (Caron et al. 2021, appendix).
    """

    size: tuple[int, int]
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    crop: float = 224 / 256
    squash: bool = False
    interpolation: Interpolation = "bicubic"
