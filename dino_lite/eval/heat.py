"""Values and classes as colors, alone and overlaid on an image."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor


def heat(values: Float[Tensor, "h w"]) -> UInt8[np.ndarray, "h w 3"]:
    """Values from their smallest (dark) to their largest (bright)."""
    from matplotlib import colormaps

    colors = colormaps["magma"](_unit_range(values).numpy())[..., :3]
    return np.asarray(colors * 255).astype(np.uint8)


def overlay(
    image: UInt8[np.ndarray, "H W 3"], values: Float[Tensor, "h w"]
) -> UInt8[np.ndarray, "H W 3"]:
    """The image in gray, overlaid with the heat map of `values`, more opaque for larger ones."""
    smooth = F.interpolate(values[None, None], size=image.shape[:2], mode="bicubic")[0, 0]
    opacity = (0.15 + 0.75 * _unit_range(smooth).sqrt())[..., None].numpy()
    return np.asarray((1 - opacity) * gray(image) + opacity * heat(smooth)).astype(np.uint8)


def palette(num: int) -> list[str]:
    """Colors for `num` classes: matplotlib's ten without gray, which means unlabeled, then lighter
    versions of these; for more classes, hues a golden angle apart at three depths.
    """
    from matplotlib import colormaps
    from matplotlib.colors import hsv_to_rgb, to_hex

    hues = [0, 1, 2, 3, 4, 5, 6, 8, 9]
    if num <= 2 * len(hues):
        pairs: Any = colormaps["tab20"]  # a color, then its lighter version
        places = [2 * hue + lighter for lighter in (0, 1) for hue in hues]
        return [to_hex(pairs(place)) for place in places[:num]]
    depths = ((0.75, 0.85), (0.55, 0.95), (0.9, 0.6))
    colors: Any = [hsv_to_rgb((i * 0.618034 % 1, *depths[i % 3])) for i in range(num)]
    return [to_hex(color) for color in colors]


def gray(image: UInt8[np.ndarray, "H W 3"]) -> Float[np.ndarray, "H W 1"]:
    """Luma (ITU-R 601)."""
    return np.asarray((image @ np.array([0.299, 0.587, 0.114]))[..., None])


def _unit_range(values: Float[Tensor, "h w"]) -> Float[Tensor, "h w"]:
    values = values - values.min()
    return values / values.max().clamp(min=1e-12)
