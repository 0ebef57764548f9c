"""Crops in PIL's 8-bit arithmetic, bit-exact with the published code.

Each operation maps a PIL image to a PIL image. `data.photometric` is the batched form.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageChops, ImageFilter

from dino_lite.data.crops import NO_JITTER, ORDERS, Drawn

_TURNS = (Image.Transpose.ROTATE_90, Image.Transpose.ROTATE_180, Image.Transpose.ROTATE_270)


@cache
def _black(size: tuple[int, int]) -> Image.Image:
    return Image.new("RGB", size)


def brightness(image: Image.Image, factor: float) -> Image.Image:
    """factor·image, clipped to 8 bits."""
    return Image.blend(_black(image.size), image, factor)


def contrast(image: Image.Image, factor: float) -> Image.Image:
    """factor·image + (1−factor)·m, m the rounded mean luma of the whole image."""
    luma = np.frombuffer(image.convert("L").tobytes(), np.uint8)
    mean = int(luma.sum(dtype=np.uint32) / luma.size + 0.5)
    return Image.blend(Image.new("RGB", image.size, (mean, mean, mean)), image, factor)


def saturation(image: Image.Image, factor: float) -> Image.Image:
    """factor·image + (1−factor)·luma."""
    return Image.blend(image.convert("L").convert("RGB"), image, factor)


def hue(image: Image.Image, shift: float) -> Image.Image:
    """Rotate hue by trunc(255·shift) of 256 levels of 8-bit HSV."""
    levels = int(shift * 255) % 256
    turned = image.convert("HSV")
    if levels:
        turned = ImageChops.add_modulo(turned, Image.new("HSV", image.size, (levels, 0, 0)))
    return turned.convert("RGB")


def gaussian_blur(image: Image.Image, sigma: float, kernel: int) -> Image.Image:
    """Gaussian of `sigma` pixels, truncated to an odd `kernel`, with reflected edges.

    Computed in floats and rounded once: DINOv2's blur, except for ties in rounding.
    """
    half = kernel // 2
    pixels = np.asarray(image, np.float32)
    height, width = pixels.shape[:2]
    weights = np.exp(-0.5 * np.square(np.arange(-half, half + 1) / sigma))
    weights = (weights / weights.sum()).astype(np.float32)
    sides = ((half, half), (half, half), (0, 0))[: pixels.ndim]
    padded = np.pad(pixels, sides, mode="reflect")
    down = sum(weight * padded[i : i + height] for i, weight in enumerate(weights))
    across = sum(weight * down[:, i : i + width] for i, weight in enumerate(weights))
    return Image.fromarray(np.rint(across).astype(np.uint8))


def solarize(
    pixels: UInt8[np.ndarray, "h w 3"], threshold: int = 128
) -> UInt8[np.ndarray, "h w 3"]:
    """Invert values of at least `threshold`."""
    return np.where(pixels >= threshold, ~pixels, pixels)


OPERATIONS: tuple[Callable[[Image.Image, float], Image.Image], ...]
OPERATIONS = (brightness, contrast, saturation, hue)


def resized_crop(image: Image.Image, box: Sequence[int], size: int) -> Image.Image:
    """`box` (top, left, height, width in pixels) as size x size pixels, bicubic, antialiased.

    Cropped before resizing: pixels outside the box have no influence.
    """
    top, left, height, width = box
    crop = image.crop((left, top, left + width, top + height))
    return crop.resize((size, size), Image.Resampling.BICUBIC)


def augment(
    image: Image.Image, params: Sequence[float], blur_kernel: int | None = None
) -> UInt8[np.ndarray, "h w 3"]:
    """An RGB image changed by `params`, the values of COLUMNS."""
    flip, *factors, order, gray, blur, invert, vertical, turns = params
    if flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if vertical:
        image = image.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
    if turns:
        image = image.transpose(_TURNS[int(turns) - 1])
    for i in ORDERS[int(order)]:
        if factors[i] != NO_JITTER[i]:
            image = OPERATIONS[i](image, factors[i])
    if gray:
        image = image.convert("L")
    if blur > 0:
        if blur_kernel is None:
            image = image.filter(ImageFilter.GaussianBlur(blur))
        else:
            image = gaussian_blur(image, blur, blur_kernel)
    if gray:  # after the blur, which takes a third of the time on one channel
        image = image.convert("RGB")
    pixels: np.ndarray = np.asarray(image)
    return solarize(pixels) if invert else pixels


def apply(
    image: Image.Image,
    box: Sequence[int],
    params: Sequence[float],
    size: int,
    blur_kernel: int | None = None,
) -> UInt8[np.ndarray, "size size 3"]:
    """One crop of an RGB image: cut out and resized, then changed."""
    return augment(resized_crop(image, box, size), params, blur_kernel)


def make_crops(
    images: Sequence[UInt8[np.ndarray, "_ _ C"]],
    drawn: Drawn,
    out: Sequence[UInt8[np.ndarray, "n _ _ C"]],
    blur_kernel: int | None = None,
) -> None:
    """Fill `out`, one array per crop, from n images of 1 or 3 channels.

    Images of one channel are processed as gray: hue and saturation do not apply.
    """
    channels = images[0].shape[2]
    boxes, params = (
        drawn.boxes.tolist(),
        drawn.params.tolist(),
    )  # Python numbers are faster one at a time
    for i, pixels in enumerate(images):
        image = Image.fromarray(pixels if channels == 3 else np.repeat(pixels, 3, axis=2))
        for s, crops in enumerate(out):
            crop = apply(image, boxes[s][i], params[s][i], crops.shape[1], blur_kernel)
            crops[i] = crop[..., :channels]
