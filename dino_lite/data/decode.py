"""From the bytes of an image file to upright RGB with 8 bits a channel."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO

import numpy as np
from PIL import Image, ImageOps

ORIENTATION = 0x0112  # EXIF tag; values above 4 mean that the image lies on its side


def decode(file: IO[bytes]) -> Image.Image:
    """The first frame, turned as EXIF says.

    Raises OSError or ValueError, with a reason, where that cannot be had: damaged or cut short,
    no image at all, more pixels than Pillow holds for safe, numbers of unknown range.
    """
    with _reasons():
        image = Image.open(file)
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
        return _to_rgb(image)


def upright_size(file: IO[bytes]) -> tuple[int, int]:
    """Height and width as `decode` gives them, from the header alone. Raises as `decode` does."""
    with _reasons():
        image = Image.open(file)
        lying = image.getexif().get(ORIENTATION, 1) > 4
        return (image.width, image.height) if lying else (image.height, image.width)


@contextmanager
def _reasons() -> Iterator[None]:
    """Make OSError or ValueError of whatever Pillow raises, and let pass what it only warns of."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # large images, damaged EXIF: both are read
            yield
    except (OSError, ValueError, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        raise ValueError(f"too large to be decoded safely ({error})") from error
    except Exception as error:
        # Damaged bytes show as SyntaxError, struct.error, zlib.error, KeyError …, by file format.
        raise OSError(f"damaged image ({type(error).__name__}: {error})") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I"):  # "I;16" in both byte orders; "I" too where a file has 16 bits
        return _scale_16_bits(image).convert("RGB")
    if image.mode == "F":
        raise ValueError("pixels are floating-point numbers of unknown range; store 8 or 16 bits")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def _scale_16_bits(image: Image.Image) -> Image.Image:
    """0 … 65535 to 0 … 255, rounded. Pillow's own conversion would clip at 255."""
    pixels = np.asarray(image).astype(np.int64)
    if pixels.min() < 0 or pixels.max() > 65535:
        raise ValueError("pixels have more than 16 bits, of unknown range; store 8 or 16 bits")
    return Image.fromarray(((pixels + 128) // 257).astype(np.uint8))
