"""TIFF files that Pillow does not read, or misreads, by tifffile."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Shaped, UInt8
from PIL import Image

from dino_lite.data.pixels import Pixels, check_dtype, straight, to_8_bits

ORIENTATION = 0x0112  # EXIF tag, 1 to 8; above 4 height and width are swapped
_WHITE_IS_ZERO, _PALETTE, _CMYK, _YCBCR, _LAB = 0, 3, 5, 6, 8  # photometric interpretations
_NUM_COLORS = {0: 1, 1: 1, 2: 3, 3: 1, 5: 4, 6: 3, 8: 3, 34892: 3}


class Samples(NamedTuple):
    """Colors and alpha of an image, as stored: neither turned nor with the requested channels.

    `largest` and `full` are its largest value and that of its bits; 0 up to 8 bits.
    """

    colors: UInt8[np.ndarray, "*S"]
    alpha: UInt8[np.ndarray, "H W"] | None = None
    largest: int = 0
    full: int = 0


class Tiff(NamedTuple):
    """An open TIFF. `shape` and `axes` (of tifffile) are those of the image to be read: the first
    page, or the first series of pages if all samples are wanted.
    """

    shape: tuple[int, ...]
    axes: str
    dtype: np.dtype
    page: Any
    read: Callable[[], Shaped[np.ndarray, "..."]]

    @property
    def size(self) -> tuple[int, int]:
        """Height and width, as stored."""
        height, width = (int(self.shape[self.axes.index(axis)]) for axis in "YX")
        return height, width

    @property
    def orientation(self) -> int:
        """The tag's value, 1 (upright) without one that is a number from 1 to 8."""
        tag = self.page.tags.get(ORIENTATION)
        value = None if tag is None else tag.value
        return value if isinstance(value, int) and 1 <= value <= 8 else 1

    @property
    def mode(self) -> str:
        """Kind and type of the samples: "RGB;16", "GRAY;float32"."""
        kind = {2: "RGB", 3: "P", 5: "CMYK", 6: "YCbCr", 8: "LAB"}.get(
            self.page.photometric, "GRAY"
        )
        bits = self.page.bitspersample
        return f"{kind};{bits if self.dtype.kind == 'u' else self.dtype}"


@contextmanager
def open_tiff(file: Any, channels: int) -> Iterator[Tiff]:
    """Open a TIFF to be read to so many channels. Raises ValueError without tifffile."""
    try:
        import tifffile
    except ImportError as error:
        raise ValueError("needs tifffile: pip install 'dino-lite[tiff]'") from error
    file.seek(0)
    with tifffile.TiffFile(file) as tiff:
        if not tiff.pages:
            raise ValueError("damaged TIFF, without a directory of images")
        page: Any = tiff.pages[0]
        image: Any = page if channels in (1, 3) else tiff.series[0]
        if image.dtype is None:
            raise ValueError("pixels of a kind that tifffile does not know")
        # Images are read in parallel already.
        yield Tiff(image.shape, image.axes, image.dtype, page, lambda: image.asarray(maxworkers=1))


def read_tiff(tiff: Tiff, pixels: Pixels) -> Samples:
    """The samples of a TIFF, "H W C" whether they are stored by pixel, by plane or by page.

    For 1 or 3 channels, colors are gray or RGB whatever they are stored as; otherwise all samples
    are taken as they are. Raises ValueError if that is not possible.
    """
    page, bits = tiff.page, tiff.page.bitspersample
    as_stored = pixels.channels not in (1, 3)
    is_palette = page.photometric == _PALETTE and not as_stored and page.colormap is not None
    if not is_palette and tiff.dtype != np.bool_:
        check_dtype(tiff.dtype, pixels.range)
    values = tiff.read()
    values = values.astype(np.uint8) if values.dtype == np.bool_ else values
    if values.ndim == 2:
        values = values[..., None]
    (channel,) = (i for i, axis in enumerate(tiff.axes.ljust(3, "S")) if axis not in "YX")
    values = np.moveaxis(values, channel, -1)
    bits = bits if isinstance(bits, int) and values.dtype.kind == "u" else 0
    if as_stored:
        return Samples(to_8_bits(values, bits, pixels.range))
    num = _NUM_COLORS.get(page.photometric, values.shape[2])
    num_more = values.shape[2] - num
    if num_more < 0 or (num == 1 and num_more > 1):  # bands of another kind, none of which is alpha
        num = values.shape[2]
    colors, alpha = values[..., :num], None
    extra = [int(kind) for kind in page.extrasamples]
    if values.shape[2] > num and extra[:1] in ([1], [2]):
        alpha = values[..., num]
        colors = straight(colors, alpha) if extra[0] == 1 else colors
        alpha = to_8_bits(alpha, bits) if alpha.dtype.kind == "u" else None
    full = 2**bits - 1 if 8 < bits <= 16 and not is_palette else 0
    largest = int(colors.max()) if full else 0
    if is_palette:
        return Samples(from_palette(colors[..., 0], page.colormap), alpha)
    shown = to_8_bits(colors, bits, pixels.range)
    if page.photometric == _WHITE_IS_ZERO:
        shown, largest = 255 - shown, full - int(colors.min()) if full else 0
    if page.photometric == _CMYK and num == 4:
        shown = np.asarray(Image.fromarray(np.ascontiguousarray(shown), "CMYK").convert("RGB"))
    if page.photometric == _YCBCR and page.compression not in (6, 7):  # those come as RGB
        shown = np.asarray(Image.fromarray(np.ascontiguousarray(shown), "YCbCr").convert("RGB"))
    if page.photometric == _LAB:
        raise ValueError("has colors in CIE L*a*b*; store RGB")
    return Samples(shown, alpha, largest, full)


def from_palette(
    index: Shaped[np.ndarray, "H W"], colors: Shaped[np.ndarray, "3 n"]
) -> UInt8[np.ndarray, "H W 3"]:
    """RGB of a palette of 16 bits, or of 8 if all its entries are that small (as libtiff does)."""
    deep = np.asarray(colors, np.uint16)
    table = to_8_bits(deep) if deep.max() > 255 else deep.astype(np.uint8)
    found: np.ndarray = table[:, np.minimum(index, deep.shape[1] - 1)]
    return np.moveaxis(found, 0, -1)
