"""Mixes the images of a batch, and their labels."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float
from torch import Tensor


def mix(
    images: Float[Tensor, "b C H W"],
    wanted: Float[Tensor, "b K"],
    mixup: float,
    cutmix: float,
    generator: np.random.Generator,
) -> tuple[Float[Tensor, "b C H W"], Float[Tensor, "b K"]]:
    """Mix each image and its label with the previous one in the batch: all pixels (Zhang et al.
    2018), or a pasted box (Yun et al. 2019).
    """
    if not mixup and not cutmix:
        return images, wanted
    boxes = bool(cutmix) and (not mixup or generator.random() < 0.5)
    alpha = cutmix if boxes else mixup
    share = float(generator.beta(alpha, alpha))  # weight of the image itself
    others = images.roll(1, dims=0)
    if boxes:
        height, width = images.shape[-2:]
        cut = (1 - share) ** 0.5
        top, bottom = _cut(cut, height, generator)
        left, right = _cut(cut, width, generator)
        images = images.clone()
        images[..., top:bottom, left:right] = others[..., top:bottom, left:right]
        share = 1 - (bottom - top) * (right - left) / (height * width)
    else:
        images = share * images + (1 - share) * others
    return images, share * wanted + (1 - share) * wanted.roll(1, dims=0)


def _cut(part: float, length: int, generator: np.random.Generator) -> tuple[int, int]:
    """Bounds of `part` of a side around a random pixel, clipped at the edges."""
    middle, half = int(generator.integers(length)), round(part * length) // 2
    return max(0, middle - half), min(length, middle + half)
