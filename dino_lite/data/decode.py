"""From the bytes of an image file to an upright array with 8 bits a channel."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from io import IOBase
from typing import IO, cast

import numpy as np
from jaxtyping import Shaped, UInt8
from PIL import Image, ImageOps

File = IO[bytes] | IOBase  # open for reading, and able to seek
ORIENTATION = 0x0112  # EXIF tag; values above 4 mean that the image lies on its side
MAX_PIXELS = 2**28  # of an image as it is decoded: 0.8 GB of RGB; more is taken for an attack
_NUMPY, _TIFF = b"\x93NUMPY", (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


def decode(
    file: File, channels: int = 3, min_pixels: int | None = None
) -> UInt8[np.ndarray, "H W C"]:
    """The first frame, turned as EXIF says, with `channels` channels.

    1 is luma and 3 is RGB, of whatever the file holds; another number must be the file's own: an
    .npy array "H W C", a TIFF of so many samples or pages, RGBA or CMYK for 4. 16 bits are scaled
    to 8. A JPEG may come back at 1/2, 1/4 or 1/8 of its sides, while at least `min_pixels` are
    left: its decoder then skips most of the work.

    Raises OSError or ValueError, with a reason, where that cannot be had: damaged or cut short, no
    image at all, more than MAX_PIXELS, numbers of unknown range, other channels.
    """
    with _reasons():
        start = file.read(6)
        file.seek(0)
        if start == _NUMPY:
            return _to_channels(_load_npy(file), channels)
        if start[:4] in _TIFF and channels not in (1, 3):
            return _to_channels(_load_tiff(file), channels)
        image = Image.open(cast("IO[bytes]", file))
        if min_pixels:
            _reduce(image, min_pixels)
        _check_pixels(image.width * image.height)
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
        return _to_channels(_to_array(image, channels), channels)


def upright_size(file: File) -> tuple[int, int]:
    """Height and width as `decode` gives them, from the header alone. Raises as `decode` does."""
    with _reasons():
        start = file.read(6)
        file.seek(0)
        if start == _NUMPY:
            height, width = _npy_header(file)[0][:2]
            return height, width
        image = Image.open(cast("IO[bytes]", file))
        lying = image.getexif().get(ORIENTATION, 1) > 4
        return (image.width, image.height) if lying else (image.height, image.width)


@contextmanager
def _reasons() -> Iterator[None]:
    """Make OSError or ValueError of whatever Pillow raises, and let pass what it only warns of."""
    most = Image.MAX_IMAGE_PIXELS
    try:
        Image.MAX_IMAGE_PIXELS = None  # the limit is ours: `_check_pixels`
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # damaged EXIF: it is read all the same
            yield
    except (OSError, ValueError):
        raise
    except MemoryError as error:
        raise ValueError("needs more memory than there is") from error
    except Exception as error:
        # Damaged bytes show as SyntaxError, struct.error, zlib.error, KeyError …, by file format.
        raise OSError(f"damaged image ({type(error).__name__}: {error})") from error
    finally:
        Image.MAX_IMAGE_PIXELS = most


def _check_pixels(num_pixels: int) -> None:
    if num_pixels > MAX_PIXELS:
        raise ValueError(
            f"too large to be decoded safely: {num_pixels:,} pixels, more than {MAX_PIXELS:,}"
        )


def _reduce(image: Image.Image, min_pixels: int) -> None:
    """Have a JPEG decoded at the smallest scale that leaves `min_pixels`; others stay as they are.

    A scale is 1/2, 1/4 or 1/8: it leaves out coefficients of the 8x8 blocks (Pillow's `draft`).
    """
    width, height = image.size
    scale = next((s for s in (8, 4, 2) if width * height >= min_pixels * s * s), 1)
    if scale > 1:
        image.draft(None, (max(1, width // scale), max(1, height // scale)))


def _to_array(image: Image.Image, channels: int) -> UInt8[np.ndarray, "H W *C"]:
    """Luma or RGB where one of them is asked for; else the bands as they are."""
    if image.mode.startswith("I"):  # "I;16" in both byte orders; "I" too where a file has 16 bits
        return _to_8_bits(np.asarray(image))
    if image.mode == "F":
        raise ValueError("pixels are floating-point numbers of unknown range; store 8 or 16 bits")
    if image.mode == "P" and ("transparency" in image.info or channels == 4):
        image = image.convert("RGBA")
    wanted = {1: "L", 3: "RGB"}.get(channels, image.mode)
    if image.mode == "L" and channels == 3:
        return np.asarray(image)
    return np.asarray(image if image.mode == wanted else image.convert("RGB").convert(wanted))


def _to_8_bits(pixels: Shaped[np.ndarray, "*S"]) -> UInt8[np.ndarray, "*S"]:
    """0 … 65535 to 0 … 255, rounded. Pillow's own conversion would clip at 255."""
    if pixels.dtype == np.uint8:
        return pixels
    if pixels.dtype.kind not in "ui":
        raise ValueError(f"pixels are {pixels.dtype}, of unknown range; store 8 or 16 bits")
    if pixels.size and (pixels.min() < 0 or pixels.max() > 65535):
        raise ValueError("pixels have more than 16 bits, of unknown range; store 8 or 16 bits")
    return ((pixels.astype(np.int64) + 128) // 257).astype(np.uint8)


def _to_channels(pixels: UInt8[np.ndarray, "H W *C"], channels: int) -> UInt8[np.ndarray, "H W C"]:
    """A plane as one channel, or as three equal ones; any other number must be right already."""
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    if pixels.ndim != 3 or 0 in pixels.shape:
        raise ValueError(f"holds numbers of shape {pixels.shape}, which is no image H W C")
    if pixels.shape[2] == 1 and channels == 3:
        pixels = np.repeat(pixels, 3, axis=2)
    if pixels.shape[2] == 3 and channels == 1:
        pixels = np.asarray(Image.fromarray(pixels).convert("L"))[..., None]
    if pixels.shape[2] != channels:
        raise ValueError(f"has {pixels.shape[2]} channels, not data.channels={channels}")
    return np.ascontiguousarray(pixels)


def _npy_header(file: File) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and kind of numbers of an .npy file, which is left behind its header."""
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"is an .npy file of version {version}; write it anew with numpy.save")
    read = {1: np.lib.format.read_array_header_1_0, 2: np.lib.format.read_array_header_2_0}
    shape, _, dtype = read[version[0]](file)
    return shape, dtype


def _load_npy(file: File) -> UInt8[np.ndarray, "*S"]:
    shape, _ = _npy_header(file)
    _check_pixels(int(np.prod(shape[:2], dtype=np.int64)))
    file.seek(0)
    return _to_8_bits(np.lib.format.read_array(file, allow_pickle=False))


def _load_tiff(file: File) -> UInt8[np.ndarray, "*S"]:
    """All samples of a TIFF, "H W C" whether they are stored by pixel, by plane or by page."""
    try:
        import tifffile
    except ImportError as error:
        raise ValueError("needs tifffile: pip install 'dino-lite[tiff]'") from error
    with tifffile.TiffFile(cast("IO[bytes]", file)) as tiff:
        series = tiff.series[0]
        _check_pixels(int(np.prod(series.shape, dtype=np.int64)) // 3)
        pixels = series.asarray()
        if series.axes[-1] != "S" and pixels.ndim == 3:  # planes or pages come first
            pixels = np.moveaxis(pixels, 0, -1)
    return _to_8_bits(pixels)
