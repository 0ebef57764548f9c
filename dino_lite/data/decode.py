"""Decodes image files into upright uint8 arrays."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from contextlib import contextmanager
from io import IOBase
from typing import IO, NamedTuple

import numpy as np
from jaxtyping import Shaped, UInt8
from PIL import Image, UnidentifiedImageError

from dino_lite.data import pil, repair
from dino_lite.data.pixels import Pixels, as_pixels, check_dtype, on_background, to_8_bits, vanishes
from dino_lite.data.pixels import to_channels as to_channels
from dino_lite.data.quiet import quiet
from dino_lite.data.suffixes import FETCH, POINTER
from dino_lite.data.tiff import Samples, open_tiff, read_tiff

File = IO[bytes] | IOBase  # readable and seekable
MAX_PIXELS = 178_956_970  # 13,377²: Pillow's limit, also for its crops; 0.5 GB of RGB
BLANK_STD = 2.0  # of luma, out of 255: below, an image is one color and noise
_NUMPY = b"\x93NUMPY"


class Header(NamedTuple):
    """What a file says of itself.

    Format and mode are Pillow's ("JPEG"; "L", "P", "CMYK"), with ";16" for 16 bits; "NPY" and the
    dtype for an array. `orientation` is EXIF's, 1 to 8. `size`: height and width, upright.
    """

    format: str
    mode: str
    orientation: int
    size: tuple[int, int]


class Look(NamedTuple):
    """An image as `decode` gives it, with its header.

    `largest` and `full` are the largest of its values and that of its bits, 0 up to 8 bits and with
    `data.range`. `vanishes`: without its alpha channel, the picture has one color.
    """

    pixels: UInt8[np.ndarray, "H W C"]
    header: Header
    largest: int
    full: int
    vanishes: bool


def decode(
    file: File, pixels: Pixels | int = 3, min_pixels: int | None = None
) -> UInt8[np.ndarray, "H W C"]:
    """The first frame, oriented as EXIF says, by the settings `pixels`, or so many channels.

    1 is luma and 3 is RGB, converted from any file; another number must be the file's own: an .npy
    array "H W C", a TIFF of so many samples or pages, LA for 2, RGBA or CMYK for 4. A JPEG may be
    decoded at 1/2, 1/4 or 1/8 of its sides if at least `min_pixels` remain, which skips most of the
    work. One that lacks no more than its end is read; other incomplete files only if `pixels` says.

    Raises OSError or ValueError, with a reason, for damaged or truncated files, unknown formats,
    more than MAX_PIXELS (three values each, in an array), values of unknown range, and other
    numbers of channels.
    """
    settings = as_pixels(pixels)
    with _reasons():
        return _finished(
            _read(file, settings, min_pixels, settings.background is not None), settings
        )


def decode_image(image: Image.Image, pixels: Pixels | int = 3) -> UInt8[np.ndarray, "H W C"]:
    """As `decode`, of an image that Pillow has opened or made. Raises as `decode` does."""
    settings = as_pixels(pixels)
    with _reasons():
        _check_pixels(image.width * image.height)
        alpha = settings.background is not None
        samples, _, left = pil.load(image, None, settings, alpha, False)
        size = pil.stored_size(image)
        return _finished(_Read(samples, Header("", image.mode, left, size), left), settings)


def look(file: File, pixels: Pixels | int = 3, min_pixels: int | None = None) -> Look:
    """As `decode`, with what `check` tells of an image. Raises as `decode` does."""
    settings = as_pixels(pixels)
    with _reasons():
        found = _read(file, settings, min_pixels, settings.channels in (1, 3))
        shown, (colors, alpha, largest, full) = _finished(found, settings), found.samples
        hidden = False
        if alpha is not None and settings.background is None:
            hidden = vanishes(to_channels(colors, settings.channels), alpha, BLANK_STD)
        levels = (0, 0) if settings.range else (largest, full)
        return Look(shown, found.header, *levels, hidden)


def upright_size(file: File) -> tuple[int, int]:
    """Height and width of `decode`'s result, from the header alone. Raises as `decode` does."""
    with _reasons():
        start = repair.start_of(file)
        if start.startswith(_NUMPY):
            height, width = _npy_header(file)[0][:2]
            return height, width
        try:
            image = pil.open_image(file, Pixels(), repair.start_of(file))
        except Exception as error:
            file = repair.without_metadata(file, error)
            image = pil.open_image(file, Pixels(), repair.start_of(file))
        if image is not None:
            return pil.size_as_seen(image, file)
        with open_tiff(file, 3) as tiff:
            return pil.upright(tiff.size, tiff.orientation)


class _Read(NamedTuple):
    """Samples that still have to be turned by `left`, as EXIF's orientation."""

    samples: Samples
    header: Header
    left: int


def _read(file: File, pixels: Pixels, min_pixels: int | None, alpha: bool) -> _Read:
    """Read a file, and if that fails what can be repaired of it."""
    try:
        return _read_once(file, pixels, min_pixels, alpha)
    except UnidentifiedImageError:
        if (start := repair.start_of(file)).startswith(POINTER):
            raise OSError(FETCH) from None
        if not start.startswith(repair.METADATA):
            raise
        error: Exception = OSError("damaged header")
    except Exception as caught:
        error = caught

    def whole(file: File) -> UInt8[np.ndarray, "..."]:
        # Not reduced, so that what is accepted does not depend on `min_pixels`.
        return _read_once(file, pixels, None, alpha).samples.colors

    for attempt, partial in repair.repaired(file, pixels.truncated, whole):
        try:
            return _read_once(attempt, pixels, min_pixels, alpha, partial)
        except Exception:  # the next one, or the first reason
            continue
    raise error


def _read_once(
    file: File, pixels: Pixels, min_pixels: int | None, alpha: bool, partial: bool = False
) -> _Read:
    """Read a file; with `partial` what there is of an incomplete one."""
    start = repair.start_of(file)
    if start.startswith(_NUMPY):
        return _read_npy(file, pixels, partial)
    image = pil.open_image(file, pixels, start)
    if image is None:
        with open_tiff(file, pixels.channels) as tiff:
            _check_pixels(math.prod(tiff.shape) // 3)
            size = pil.upright(tiff.size, tiff.orientation)
            header = Header("TIFF", tiff.mode, tiff.orientation, size)
            return _Read(read_tiff(tiff, pixels), header, tiff.orientation)
    _check_pixels(image.width * image.height)
    form, mode = pil.format_and_mode(image)
    size = pil.stored_size(image)
    if min_pixels:
        pil.reduce(image, min_pixels)
    samples, orientation, left = pil.load(image, file, pixels, alpha, partial)
    return _Read(samples, Header(form, mode, orientation, pil.upright(size, orientation)), left)


def _finished(found: _Read, pixels: Pixels) -> UInt8[np.ndarray, "H W C"]:
    """With the requested channels, on the background, upright."""
    shown, alpha = found.samples.colors, found.samples.alpha
    shown = to_channels(shown, pixels.channels)
    if alpha is not None and pixels.background is not None and pixels.channels in (1, 3):
        shown = on_background(shown, alpha, pixels.background)
    return np.ascontiguousarray(_turned(shown, found.left))


def _turned(pixels: UInt8[np.ndarray, "..."], orientation: int) -> UInt8[np.ndarray, "..."]:
    """Rows and columns rearranged by the EXIF `orientation`."""
    if orientation > 4:
        pixels = pixels.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return pixels


@contextmanager
def _reasons() -> Iterator[None]:
    """Turn any exception into OSError or ValueError with a reason, which also tells what libraries
    would have written to stderr.
    """
    with quiet() as messages:
        try:
            yield
        except UnidentifiedImageError as error:
            raise OSError("no image of a known format") from error
        except Image.DecompressionBombError as error:
            raise ValueError(f"too large to be decoded safely: {error}") from error
        except MemoryError as error:
            raise ValueError("needs more memory than there is") from error
        except (OSError, ValueError) as error:
            if not messages or (isinstance(error, OSError) and error.strerror):
                raise
            kind = OSError if isinstance(error, OSError) else ValueError
            raise kind(f"{error} ({messages[0]})") from error
        except Exception as error:
            # Damaged files raise SyntaxError, struct.error, zlib.error, KeyError … by format.
            told = "".join(f"; {message}" for message in messages[:1])
            raise OSError(f"damaged image ({type(error).__name__}: {error}{told})") from error


def _check_pixels(num_pixels: int) -> None:
    if num_pixels > MAX_PIXELS:
        raise ValueError(
            f"too large to be decoded safely: {num_pixels:,} pixels, more than {MAX_PIXELS:,}"
        )


# ----------------------------------------------------------------------------- arrays, by NumPy


def _npy_header(file: File) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and dtype of an .npy file, which is left positioned after its header."""
    file.seek(0)
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"is an .npy file of version {version}; write it again with numpy.save")
    read = {1: np.lib.format.read_array_header_1_0, 2: np.lib.format.read_array_header_2_0}
    shape, _, dtype = read[version[0]](file)
    return shape, dtype


def _read_npy(file: File, pixels: Pixels, partial: bool) -> _Read:
    """An array "H W" or "H W C". Refused before it is read if its values or size are not known."""
    shape, dtype = _npy_header(file)
    check_dtype(dtype, pixels.range)
    _check_pixels(math.prod(shape) // 3)
    if partial:
        file.seek(0)
        header_and_values = file.read() + bytes(math.prod(shape) * dtype.itemsize)
        file = io.BytesIO(header_and_values)
    file.seek(0)
    values: Shaped[np.ndarray, "*S"] = np.lib.format.read_array(file, allow_pickle=False)
    full = np.iinfo(dtype).max if dtype.kind == "u" and dtype.itemsize == 2 else 0
    largest = int(values.max()) if full and values.size else 0
    samples = Samples(to_8_bits(values, 0, pixels.range), None, largest, full)
    height, width = (*shape, 0, 0)[:2]
    return _Read(samples, Header("NPY", str(dtype), 1, (height, width)), 1)
