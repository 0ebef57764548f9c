"""Maps of numbers as colors, alone and laid on an image."""

from __future__ import annotations

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
    """The image in gray, and on it the heat of `values`, the more opaque the larger they are."""
    smooth = F.interpolate(values[None, None], size=image.shape[:2], mode="bicubic")[0, 0]
    opacity = (0.15 + 0.75 * _unit_range(smooth).sqrt())[..., None].numpy()
    gray = (image @ np.array([0.299, 0.587, 0.114]))[..., None]  # luma, ITU-R 601
    return np.asarray((1 - opacity) * gray + opacity * heat(smooth)).astype(np.uint8)


def _unit_range(values: Float[Tensor, "h w"]) -> Float[Tensor, "h w"]:
    values = values - values.min()
    return values / values.max().clamp(min=1e-12)
