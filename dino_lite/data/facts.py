"""Facts about the data that a run's plan depends on."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64, UInt8

from dino_lite.contracts import Source, Splits, UserError
from dino_lite.data.decode import Look, look
from dino_lite.data.findings import judge_alpha, judge_range
from dino_lite.data.sources import reason
from dino_lite.wording import count

NUM_LOOKED_AT = 64
_MIN_PIXELS = 256 * 256  # enough for the mean color; large files may be decoded smaller


class DataFacts(NamedTuple):
    """Counts, the median size of an image in pixels, and its channels.

    `num_classes` is 0 without labels. `mean` and `std` of each channel are in [0, 1]. `sizes`: the
    sizes of the images that were read, "64x48 pixels" or "37x301 to 320x40 pixels" (by area).
    `warnings`: sentences that name settings of data which would show more of the images.
    """

    num_images: int
    num_test: int
    num_classes: int
    height: int
    width: int
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    sizes: str
    warnings: tuple[str, ...] = ()


def read_facts(splits: Splits) -> DataFacts:
    """Count the images and read up to 64 evenly spaced ones of train.

    Raises UserError if no image of train can be decoded.
    """
    source = splits.train
    spread = np.linspace(0, len(source) - 1, min(len(source), NUM_LOOKED_AT)).astype(int).tolist()
    source.prefetch(spread)
    seen, sizes, stored = [], [], []
    for index in spread:  # both at once, so that a table's row group is read only once
        found = _stored(source, index)
        image = _read(source, index) if found is None else found.pixels
        size = _size(source, index) if found is None else found.header.size
        if not isinstance(image, str):
            seen.append(_look(image))
        if size is not None:
            sizes.append(size)
        if found is not None:
            stored.append(found)
    seen = seen or [_look(first_readable(source))]
    sizes = sizes or [look.size for look in seen]
    vanishing = sum(found.vanishes for found in stored)
    height, width = np.median(sizes, axis=0)
    mean = np.mean([look.mean for look in seen], axis=0)  # C
    square = np.mean([look.square for look in seen], axis=0)
    std = np.sqrt(
        np.maximum(square - mean**2, 1e-6)
    )  # keeps the scale of a constant channel finite
    return DataFacts(
        num_images=len(source),
        num_test=0 if splits.test is None else len(splits.test),
        num_classes=0 if source.labels is None else len(source.classes),
        height=round(height),
        width=round(width),
        channels=len(mean),
        mean=tuple(mean.round(4).tolist()),
        std=tuple(std.round(4).tolist()),
        sizes=_span(sizes),
        warnings=(*_judge_range(stored), *judge_alpha(vanishing, len(stored))),
    )


def _span(sizes: list[tuple[int, int]]) -> str:
    """The smallest and the largest of the sizes (height, width), as width x height."""
    ends = sorted(sizes, key=lambda size: (size[0] * size[1], size))
    shown = dict.fromkeys(f"{width}x{height}" for height, width in (ends[0], ends[-1]))
    return f"{' to '.join(shown)} pixels"


def _judge_range(stored: Sequence[Look]) -> Iterator[str]:
    deep = [(found.largest, found.largest / found.full) for found in stored if found.full]
    largest, fraction = map(max, zip(*deep, strict=True)) if deep else (0, 0.0)
    return judge_range(len(deep), largest, fraction)


class _Look(NamedTuple):
    """Height and width of an image, and per channel the mean and the mean square."""

    size: tuple[int, int]
    mean: Float64[np.ndarray, "C"]
    square: Float64[np.ndarray, "C"]


def _look(image: UInt8[np.ndarray, "H W C"]) -> _Look:
    """Large images are subsampled by rows and columns."""
    height, width = image.shape[:2]
    stride = max(1, math.isqrt(height * width // _MIN_PIXELS))
    values = image[::stride, ::stride] / 255.0
    return _Look((height, width), values.mean((0, 1)), np.square(values).mean((0, 1)))


def _read(source: Source, index: int) -> UInt8[np.ndarray, "H W C"] | str:
    """An image, perhaps downscaled; or why it cannot be read."""
    try:
        return source.read(index, _MIN_PIXELS)
    except (OSError, ValueError) as error:
        return f"{source.name(index)}: {reason(error)}"


def _stored(source: Source, index: int) -> Look | None:
    """An image and the header of its file, if it has one and can be read."""
    try:
        content = source.encoded(index)
        if content is not None:
            return look(io.BytesIO(content[0]), source.pixels or source.channels, _MIN_PIXELS)
    except (OSError, ValueError):
        pass
    return None


def first_readable(source: Source) -> UInt8[np.ndarray, "H W C"]:
    """The first image that can be decoded. Raises UserError if there is none."""
    first = ""
    for index in range(len(source)):
        image = _read(source, index)
        if not isinstance(image, str):
            return image
        first = first or image
    raise UserError(
        f"None of the {count(len(source), 'image')} can be read, the first being {first}; repair "
        "them, or check data.root."
    )


def _size(source: Source, index: int) -> tuple[int, int] | None:
    """Height and width of an image; None if it cannot be read."""
    try:
        return source.image_size(index)
    except (OSError, ValueError):
        return None
