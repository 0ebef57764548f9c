"""Splits and classes of images in tar shards, by the names of shards and of folders in them."""

from __future__ import annotations

import os
import posixpath
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool

from dino_lite.data.class_names import name_classes
from dino_lite.data.folder_names import matches
from dino_lite.data.labels import NO_LABELS, Labels, Named, encode_auto
from dino_lite.data.layout import split_files
from dino_lite.data.path_layout import layout_of
from dino_lite.data.paths import PathList
from dino_lite.data.selection import Selection
from dino_lite.data.tar_index import TarIndex


class Packed(NamedTuple):
    """The images of train and of test, their labels by folder, and what was left out."""

    train: TarIndex
    test: TarIndex
    by_folder: Labels
    left_out: Sequence[str]


def split_packed(index: TarIndex, chosen: Selection) -> Packed:
    """Split by the names of shards; where these say nothing, by the folders in the shards."""
    if chosen.exclude:
        index = _where(index, ~np.array([matches(n, chosen.exclude) for n in index.names], bool))
    counts = dict(zip(index.shards, np.diff(index.bounds).tolist(), strict=True))
    trains, tests, left_out = split_files(counts, chosen.train, chosen.test)
    if not any("/" in name for name in index.names):
        return Packed(index.part(trains), index.part(tests), NO_LABELS, left_out)
    if trains and (tests or left_out):  # the folders name the classes only
        train, test = index.part(trains), index.part(tests)
        both = [sorted({posixpath.dirname(n) for n in part.names}) for part in (train, test)]
        inner = [{path: path.split("/") if path else [] for path in each} for each in both]
    else:
        paths = PathList()
        for name in index.names:
            paths.add(os.fsencode(name))
        of = layout_of(paths.paths(), chosen)
        train, test = _where(index, of.train), _where(index, of.test)
        left_out = list(of.layout.left_out)
        inner = [of.layout.train, of.layout.test]
    classes = name_classes(inner[0], inner[1], chosen.class_level)
    named = [
        Named.collect(of_folder[posixpath.dirname(name)] for name in part.names)
        for of_folder, part in zip(classes, (train, test), strict=True)
    ]
    of_test = named[1] if test.names else None
    return Packed(train, test, encode_auto(named[0], of_test, train.names.__getitem__), left_out)


def _where(index: TarIndex, rows: Bool[np.ndarray, "N"]) -> TarIndex:
    return index if rows.all() else index.select(np.flatnonzero(rows).tolist())
