"""Decodes image files into upright uint8 arrays."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from io import IOBase
from typing import IO, Any, cast

import numpy as np
from jaxtyping import Shaped, UInt8
from PIL import Image, UnidentifiedImageError

from dino_lite.data.suffixes import HEIF

File = IO[bytes] | IOBase  # readable and seekable
MAX_PIXELS = 178_956_970  # 13,377²: Pillow's limit, also for its crops; 0.5 GB of RGB
ORIENTATION = 0x0112  # EXIF tag, 1 to 8; above 4 height and width are swapped
_NUMPY, _TIFF = b"\x93NUMPY", (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_HEIF = re.compile(rb"(?s).{4}ftyp.{0,48}?(hei[cxms]|hev[cxms])")  # brands of HEVC's images
# Not all of Pillow's: EPS would start another program. TGA comes last since it has no signature.
_FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "PPM", "JPEG2000", "AVIF", "TGA")
_WIDTH, _HEIGHT, _BITS, _SAMPLES, _PLANAR = 256, 257, 258, 277, 284  # tags of TIFF


def decode(
    file: File, channels: int = 3, min_pixels: int | None = None
) -> UInt8[np.ndarray, "H W C"]:
    """The first frame, oriented as EXIF says, with `channels` channels.

    1 is luma and 3 is RGB, converted from any file, without transparency; another number must be
    the file's own: an .npy array "H W C", a TIFF of so many samples or pages, LA for 2, RGBA or
    CMYK for 4. 16 bits are scaled to 8. A JPEG may be decoded at 1/2, 1/4 or 1/8 of its sides if at
    least `min_pixels` remain, which skips most of the work.

    Raises OSError or ValueError, with a reason, for damaged or truncated files, unknown formats,
    more than MAX_PIXELS (three values each, in an array), values of unknown range, and other
    numbers of channels.
    """
    with _reasons():
        start = _start(file)
        if start.startswith(_NUMPY):
            return to_channels(_load_npy(file), channels)
        image = None if start[:4] in _TIFF and channels not in (1, 3) else _open(file)
        if image is None:
            return to_channels(_load_tiff(file), channels)
        _check_pixels(image.width * image.height)
        if min_pixels:
            _reduce(image, min_pixels)
        image.load()
        return to_channels(_turned(_to_array(image, channels), _orientation(image)), channels)


def upright_size(file: File) -> tuple[int, int]:
    """Height and width of `decode`'s result, from the header alone. Raises as `decode` does."""
    with _reasons():
        if _start(file).startswith(_NUMPY):
            height, width = _npy_header(file)[0][:2]
            return height, width
        image = _open(file)
        if image is None:
            with _tiff_series(file) as (series, orientation):
                height, width = (series.shape[series.axes.index(axis)] for axis in "YX")
        else:
            tags: Any = getattr(image, "tag_v2", {})  # some versions swap `size` of a TIFF
            height, width = tags.get(_HEIGHT, image.height), tags.get(_WIDTH, image.width)
            orientation = _orientation(image)
        return (width, height) if orientation > 4 else (height, width)


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
            f"has {pixels.shape[2]} channels, not data.channels={channels}"
            + (last if pixels.shape[0] == channels else "")
        )
    return np.ascontiguousarray(pixels)


@contextmanager
def _reasons() -> Iterator[None]:
    """Turn any exception into OSError or ValueError with a reason; suppress warnings."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about damaged EXIF and large sizes
            yield
    except UnidentifiedImageError as error:
        raise OSError("no image of a known format") from error
    except (OSError, ValueError):
        raise
    except Image.DecompressionBombError as error:
        raise ValueError(f"too large to be decoded safely: {error}") from error
    except MemoryError as error:
        raise ValueError("needs more memory than there is") from error
    except Exception as error:
        # Damaged files raise SyntaxError, struct.error, zlib.error, KeyError … by format.
        raise OSError(f"damaged image ({type(error).__name__}: {error})") from error


def _start(file: File) -> bytes:
    """The leading bytes, which identify the format."""
    file.seek(0)
    start: bytes = file.read(64)
    file.seek(0)
    return start


def _check_pixels(num_pixels: int) -> None:
    if num_pixels > MAX_PIXELS:
        raise ValueError(
            f"too large to be decoded safely: {num_pixels:,} pixels, more than {MAX_PIXELS:,}"
        )


# ----------------------------------------------------------------------------- images, by Pillow


@cache
def _formats() -> tuple[str, ...]:
    """Those of _FORMATS that the installed Pillow supports."""
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


@cache
def _heif_format() -> tuple[str, ...]:
    """HEIF, which pillow-heif adds to Pillow. It turns images itself, and resets EXIF's tag."""
    try:
        from pillow_heif import register_heif_opener
    except ImportError as error:
        raise ValueError(f"needs pillow-heif: {HEIF}") from error
    register_heif_opener()
    return ("HEIF",)


def _open(file: File) -> Image.Image | None:
    """The image, header read; None for a TIFF that tifffile must read.

    Pillow reads at most four samples, may take the first for the whole image, and misreads 16-bit
    planes.
    """
    formats = _heif_format() if _HEIF.match(_start(file)) else _formats()
    try:
        image = Image.open(cast("IO[bytes]", file), formats=formats)
    except UnidentifiedImageError:
        if _start(file)[:4] in _TIFF:
            return None
        raise
    tags: Any = getattr(image, "tag_v2", {})
    planes = tags.get(_SAMPLES, 1) if tags.get(_PLANAR) == 2 else 1
    return None if planes > 4 or (planes > 1 and max(tags.get(_BITS, (1,))) > 8) else image


def _reduce(image: Image.Image, min_pixels: int) -> None:
    """Set a JPEG's decoder to the smallest scale that leaves `min_pixels`.

    Scales are 1/2, 1/4 and 1/8, which skip coefficients of the 8x8 blocks (Pillow's `draft`). A
    longer side counts as at most twice the shorter one, since crops are roughly square.
    """
    shorter, longer = sorted(image.size)
    pixels = shorter * min(longer, 2 * shorter)
    scale = next((s for s in (8, 4, 2) if pixels >= min_pixels * s * s), 1)
    if scale > 1:
        image.draft(None, (max(1, image.width // scale), max(1, image.height // scale)))


def _orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 (upright) without one or if EXIF is damaged."""
    try:
        # A PNG's `getexif` would decode the pixels to look for EXIF after them.
        value = Image.Image.getexif(image).get(ORIENTATION)
    except Exception:
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _turned(pixels: UInt8[np.ndarray, "..."], orientation: int) -> UInt8[np.ndarray, "..."]:
    """Rows and columns rearranged by the EXIF `orientation`."""
    if orientation > 4:
        pixels = pixels.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return pixels


def _to_array(image: Image.Image, channels: int) -> UInt8[np.ndarray, "H W *C"]:
    """Convert to luma or RGB if requested; else keep the bands."""
    deep = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))
    if deep:  # or 12 bits, in a TIFF
        bits = getattr(image, "tag_v2", {}).get(_BITS, (16,))[0]
        return _to_8_bits(np.asarray(image).astype(np.uint16), bits)
    if image.mode in ("I", "F"):
        raise ValueError("pixels have 32 bits, of unknown range; store 8 or 16")
    if image.mode in ("1", "L") or (image.mode == "LA" and channels != 2):
        return np.asarray(_as(image, "L"))
    if image.mode == "P" and ("transparency" in image.info or channels == 4):
        image = image.convert("RGBA")
    if channels in (1, 3):
        image = _as(image, "RGB")
    return np.asarray(_as(image, "L") if channels == 1 else image)


def _as(image: Image.Image, mode: str) -> Image.Image:
    return image if image.mode == mode else image.convert(mode)  # avoids a copy


# ----------------------------------------------------------------- arrays, by NumPy and tifffile


def _to_8_bits(pixels: Shaped[np.ndarray, "*S"], bits: int = 16) -> UInt8[np.ndarray, "*S"]:
    """uint8 as is; wider unsigned values are scaled and rounded, since Pillow would clip at 255."""
    if pixels.dtype == np.uint8:
        return pixels
    most = 2**bits - 1
    scaled: np.ndarray = ((pixels.astype(np.uint32) * 255 + most // 2) // most).astype(np.uint8)
    return scaled


def _check_numbers(shape: tuple[int, ...], dtype: np.dtype) -> None:
    """Refuse an array before it is read: neither uint8 nor uint16, or too large."""
    if dtype.kind != "u" or dtype.itemsize > 2:
        raise ValueError(f"pixels are {dtype}, of unknown range; store uint8 or uint16")
    _check_pixels(math.prod(shape) // 3)


def _npy_header(file: File) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and dtype of an .npy file, which is left positioned after its header."""
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"is an .npy file of version {version}; write it again with numpy.save")
    read = {1: np.lib.format.read_array_header_1_0, 2: np.lib.format.read_array_header_2_0}
    shape, _, dtype = read[version[0]](file)
    return shape, dtype


def _load_npy(file: File) -> UInt8[np.ndarray, "*S"]:
    _check_numbers(*_npy_header(file))
    file.seek(0)
    return _to_8_bits(np.lib.format.read_array(file, allow_pickle=False))


@contextmanager
def _tiff_series(file: File) -> Iterator[tuple[Any, int]]:
    """The first series of a TIFF (an image, or pages of one size), and its orientation."""
    try:
        import tifffile
    except ImportError as error:
        raise ValueError("needs tifffile: pip install 'dino-lite[tiff]'") from error
    file.seek(0)
    with tifffile.TiffFile(cast("IO[bytes]", file)) as tiff:
        tag = cast(Any, tiff.pages[0]).tags.get(ORIENTATION)
        yield tiff.series[0], 1 if tag is None else int(tag.value)


def _load_tiff(file: File) -> UInt8[np.ndarray, "*S"]:
    """All samples of a TIFF, "H W C" whether they are stored by pixel, by plane or by page."""
    with _tiff_series(file) as (series, orientation):
        _check_numbers(series.shape, series.dtype)
        pixels = series.asarray(maxworkers=1)  # images are read in parallel already
        if pixels.ndim == 3:
            (channel,) = (i for i, axis in enumerate(series.axes) if axis not in "YX")
            pixels = np.moveaxis(pixels, channel, -1)
    return _turned(_to_8_bits(pixels), orientation)
