"""From stored values to 8-bit channels: scaling, transparency, number of channels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Shaped, UInt8
from PIL import Image

from dino_lite.settings.kinds import Must, Size
from dino_lite.wording import count

Bounds = Annotated[
    Sequence[float],
    Must(
        "a list of two numbers, the smaller first",
        lambda pair: len(pair) == 2 and pair[0] < pair[1],
    ),
]
Color = Annotated[
    Sequence[int],
    Must(
        "white, black or a list of three whole numbers from 0 to 255",
        lambda rgb: len(rgb) == 3 and all(0 <= value <= 255 for value in rgb),
    ),
]
Background = Literal["white", "black"] | Color


class Pixels(NamedTuple):
    """How files become pixels: the settings that `data` has of them.

    `channels`: 1 is luma and 3 is RGB, of any file; another number must be the file's own. `range`:
    the values that become 0 and 255, of pixels that are stored with more than 8 bits; None scales
    unsigned ones by their bits, and refuses others. `background`: the color on which images with
    transparency are put (of 1 or 3 channels); None drops alpha. `truncated`: read what there is of
    an incomplete file, instead of refusing it.
    """

    channels: Size = 3
    range: Bounds | None = None
    background: Background | None = None
    truncated: bool = False


def as_pixels(pixels: Pixels | int) -> Pixels:
    """The settings, or their defaults with so many channels."""
    return Pixels(pixels) if isinstance(pixels, int) else pixels


def to_8_bits(
    values: Shaped[np.ndarray, "*S"], bits: int = 0, bounds: Bounds | None = None
) -> UInt8[np.ndarray, "*S"]:
    """uint8 as is; `bounds` are mapped to 0 and 255; unsigned values are scaled by their `bits` (0:
    those of the type) and rounded.

    Raises ValueError for values of unknown range.
    """
    if values.dtype == np.uint8 and bits in (0, 8):
        return values
    if bounds is not None and bits not in range(1, 8):
        low, high = bounds
        exact = np.float32 if values.dtype.itemsize <= 2 else np.float64
        # NaN is low; infinities are clipped, as other values outside are.
        clipped = np.clip(np.nan_to_num(values.astype(exact), nan=low), low, high)
        scaled = (clipped - exact(low)) * exact(255 / (high - low))
        mapped: np.ndarray = np.clip(scaled + exact(0.5), 0, 255.5).astype(np.uint8)
        return mapped
    check_dtype(values.dtype, None)
    most = 2 ** (bits or 8 * values.dtype.itemsize) - 1
    levels: np.ndarray = ((values.astype(np.uint32) * 255 + most // 2) // most).astype(np.uint8)
    return levels


def check_dtype(dtype: np.dtype, bounds: Bounds | None) -> None:
    """Refuse values that `to_8_bits` cannot map. Raises ValueError."""
    known = dtype.kind == "u" and dtype.itemsize <= 2
    if not known and (bounds is None or dtype.kind not in "buif"):
        raise ValueError(
            f"pixels are {dtype}, of unknown range; store uint8 or uint16, or set "
            "data.range=[low, high]"
        )


def straight(
    colors: Shaped[np.ndarray, "H W C"], alpha: Shaped[np.ndarray, "H W"]
) -> Shaped[np.ndarray, "H W C"]:
    """Colors that were multiplied by `alpha` (of the same range), divided by it again.

    A color above its alpha shows that the file says so wrongly: then they are returned as stored.
    """
    if colors.dtype.kind != "u" or (colors > alpha[..., None]).any():
        return colors
    most, divisor = np.iinfo(alpha.dtype).max, np.maximum(alpha, 1)[..., None].astype(np.uint64)
    divided: np.ndarray = (colors.astype(np.uint64) * most + divisor // 2) // divisor
    return divided.astype(colors.dtype)


def on_background(
    pixels: UInt8[np.ndarray, "H W C"], alpha: UInt8[np.ndarray, "H W"], background: Background
) -> UInt8[np.ndarray, "H W C"]:
    """An image of 1 or 3 channels on one color."""
    rgb = {"white": [255] * 3, "black": [0] * 3}.get(str(background), background)
    color = np.asarray(rgb, np.uint8)[None, None]
    if pixels.shape[2] == 1:
        color = to_channels(color, 1)
    shown = alpha[..., None].astype(np.uint32)
    mixed: np.ndarray = (pixels * shown + color * (255 - shown) + 127) // 255
    return mixed.astype(np.uint8)


def vanishes(
    pixels: UInt8[np.ndarray, "H W C"], alpha: UInt8[np.ndarray, "H W"], tolerance: float
) -> bool:
    """Whether the visible pixels have one color, up to a standard deviation of `tolerance`, and do
    not stand out from the hidden ones: without alpha there is nothing to see.
    """
    visible: Bool[np.ndarray, "H W"] = alpha > 0
    if visible.all() or not visible.any():
        return False
    seen, hidden = pixels[visible], pixels[~visible]
    away = np.abs(seen.mean(0) - hidden.mean(0)).max()
    return bool(seen.std(0).max() < tolerance and away < 32)


def to_channels(pixels: UInt8[np.ndarray, "*S"], channels: int) -> UInt8[np.ndarray, "H W C"]:
    """Gray to one channel or three equal ones, RGB to luma; otherwise the number must match.

    Raises ValueError if it does not.
    """
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    if pixels.ndim != 3 or 0 in pixels.shape:
        raise ValueError(f"has shape {pixels.shape}, not that of an image, H W C")
    if pixels.shape[2] == 1 and channels == 3:
        pixels = np.repeat(pixels, 3, axis=2)
    if pixels.shape[2] == 3 and channels == 1:
        pixels = np.asarray(Image.fromarray(np.ascontiguousarray(pixels)).convert("L"))[..., None]
    if pixels.shape[2] != channels:
        last = f"; an array is H W C, but this is {pixels.shape}"
        raise ValueError(
            f"has {count(pixels.shape[2], 'channel')}, not data.channels={channels}"
            + (last if pixels.shape[0] == channels else "")
        )
    return np.ascontiguousarray(pixels)
