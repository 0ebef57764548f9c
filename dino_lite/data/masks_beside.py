"""Masks in the folder of their photographs: 1.png beside 1_mask.png."""

from __future__ import annotations

import os
import re

import numpy as np

from dino_lite.data.layout import were
from dino_lite.data.paths import Paths

_WORDS = (b"mask", b"_gt", b"_seg", b"trimap", b"annot")
_STEM = re.compile(
    r"(.+?)[-_. ](?:masks?|gt|seg(?:mentation)?|trimap|annot(?:ation)?)(?:[-_]?\d+)?"
)
_MOST = 0.9


def without_masks(images: Paths) -> tuple[Paths, str]:
    """The images without the masks beside them, and a sentence that counts these, if there are any.

    A file is a mask if its stem is that of another file of its folder and a word such as `_mask`,
    provided that this holds for nearly all files with such a word.
    """
    if not images.mentions(_WORDS):
        return images, ""
    stems = [os.path.splitext(os.fsdecode(path))[0].lower() for path in images]
    known = set(stems)
    named = [match and match[1] for match in map(_STEM.fullmatch, stems)]
    rows = np.array([stem is not None and stem in known for stem in named])
    if not rows.any() or rows.sum() < _MOST * sum(stem is not None for stem in named):
        return images, ""
    first = os.path.basename(os.fsdecode(images[int(rows.argmax())]))
    told = (
        f"{were(int(rows.sum()))} left out as masks of the images beside them ({first}): "
        "data.exclude=none takes them in."
    )
    return images.where(~rows), told
