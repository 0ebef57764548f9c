"""What a run must know of its data before it is planned."""

from __future__ import annotations

from itertools import chain
from typing import NamedTuple

import numpy as np

from dino_lite.contracts import Source, Splits, UserError

NUM_LOOKED_AT = 64


class DataFacts(NamedTuple):
    """Counts, and the median size of an image in pixels. `num_classes` is 0 without labels."""

    num_images: int
    num_test: int
    num_classes: int
    height: int
    width: int


def read_facts(splits: Splits) -> DataFacts:
    """Count, and measure up to 64 evenly spaced images of train.

    One image must decode: where not a single one of all does, that is a UserError.
    """
    source = splits.train
    spread = np.linspace(0, len(source) - 1, min(len(source), NUM_LOOKED_AT)).astype(int).tolist()
    decoded = _first_size(source, spread)
    sizes = [size for index in spread if (size := _header_size(source, index))] or [decoded]
    height, width = np.median(sizes, axis=0)
    return DataFacts(
        num_images=len(source),
        num_test=0 if splits.test is None else len(splits.test),
        num_classes=0 if source.labels is None else len(source.classes),
        height=round(height),
        width=round(width),
    )


def _first_size(source: Source, spread: list[int]) -> tuple[int, int]:
    """Height and width of an image that decodes: of `spread`, else of all."""
    reason = ""
    for index in chain(spread, range(len(source))):
        try:
            image = source.read(index)
        except (OSError, ValueError) as error:
            reason = reason or f"{source.name(index)}: {error}"
        else:
            return image.height, image.width
    raise UserError(
        f"None of the {len(source)} images can be read, the first being {reason}; mend them, or "
        "check data.root."
    )


def _header_size(source: Source, index: int) -> tuple[int, int] | None:
    """Height and width of an image, if it has them; undecoded from a source that offers `size`."""
    size = getattr(source, "size", None)
    try:
        if size is not None:
            height, width = size(index)
            return height, width
        image = source.read(index)
    except (OSError, ValueError):
        return None
    return image.height, image.width
