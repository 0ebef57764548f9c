"""A backbone ready for `formats.publish`: with its card, and the images that exports are compared
on.
"""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np

from dino_lite.contracts import Source, Splits
from dino_lite.data.subset import spread
from dino_lite.formats.opened import Opened
from dino_lite.formats.verify import Original

_NUM_IMAGES = 8  # for the comparison
_NUM_SIZES = 64  # images whose size is looked at


def to_export(opened: Opened, splits: Splits, card: dict[str, Any]) -> tuple[Opened, Original]:
    """`opened` in float32 with `card`, and what its exports are compared with."""
    pictures, size = _pictures(splits.train), opened.preprocessing.size
    sized = all(each.shape[:2] == size for each in pictures) and _all_of_size(splits.train, size)
    opened = opened._replace(backbone=opened.backbone.float(), card=card, sized=sized)
    return opened, Original(opened, pictures)


def _pictures(source: Source) -> list[np.ndarray]:
    """The first images that can be read, of which `open_data` has found one."""
    found = []
    for index in range(len(source)):
        with contextlib.suppress(OSError, ValueError):
            found.append(source.read(index))
        if len(found) == _NUM_IMAGES:
            break
    return found


def _all_of_size(source: Source, size: tuple[int, int]) -> bool:
    """Whether all images, of up to `_NUM_SIZES` evenly spread ones that can be read, are of it."""
    for index in spread(len(source), _NUM_SIZES).tolist():
        with contextlib.suppress(OSError, ValueError):
            if source.image_size(index) != size:
                return False
    return True
