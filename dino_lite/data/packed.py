"""Splits and classes of images in tar shards, by the names of shards and of folders in them."""

from __future__ import annotations

import posixpath
from typing import NamedTuple

import numpy as np

from dino_lite.data.class_names import name_classes
from dino_lite.data.labels import NO_LABELS, Labels, Named, encode_auto
from dino_lite.data.layout import Layout, read_layout, split_files
from dino_lite.data.selection import Selection
from dino_lite.data.tar_index import TarIndex


class Packed(NamedTuple):
    """The images of train and of test, their labels by folder, and what was left out."""

    train: TarIndex
    test: TarIndex
    by_folder: Labels
    left_out: list[str]


def split_packed(index: TarIndex, chosen: Selection, class_level: int = 0) -> Packed:
    """Split by the names of shards; where these say nothing, by the folders in the shards."""
    counts = dict(zip(index.shards, np.diff(index.bounds).tolist(), strict=True))
    trains, tests, left_out = split_files(counts, chosen.train, chosen.test)
    if not any("/" in name for name in index.names):
        return Packed(index.part(trains), index.part(tests), NO_LABELS, left_out)
    folder_of = [posixpath.dirname(name) for name in index.names]
    if trains and (tests or left_out):  # the folders name the classes only
        found = (index.part(trains), index.part(tests))
        folders = [sorted({posixpath.dirname(name) for name in part.names}) for part in found]
        inner = [{path: path.split("/") if path else [] for path in each} for each in folders]
        layout = Layout(inner[0], "", inner[1], "", left_out)
    else:
        layout = _inner_layout(index, folder_of, chosen)
        rows = [
            [i for i, folder in enumerate(folder_of) if folder in part]
            for part in (layout.train, layout.test)
        ]
        whole = len(rows[0]) == len(folder_of)
        found = (index if whole else index.select(rows[0]), index.select(rows[1]))
    classes = name_classes(layout.train, layout.test, class_level)
    named = [
        Named.collect(of[posixpath.dirname(name)] for name in part.names)
        for of, part in zip(classes, found, strict=True)
    ]
    of_test = named[1] if found[1].names else None
    by_folder = encode_auto(named[0], of_test, found[0].names.__getitem__)
    return Packed(*found, by_folder, layout.left_out)


def _inner_layout(index: TarIndex, folder_of: list[str], chosen: Selection) -> Layout:
    """The layout of the folders in all shards, as if these were unpacked into one place."""
    stems: dict[str, list[str]] = {folder: [] for folder in folder_of}
    for folder, name in zip(folder_of, index.names, strict=True):
        stems[folder].append(posixpath.splitext(posixpath.basename(name))[0])
    counts = {folder: len(names) for folder, names in stems.items()}
    return read_layout(counts, stems.__getitem__, chosen.train, chosen.test, chosen.automatic)
