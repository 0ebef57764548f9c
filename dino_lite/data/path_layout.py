"""The layout of a list of paths: what `read_layout` says of their folders."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from dino_lite.data.layout import Layout, read_layout, were
from dino_lite.data.mask_folders import MASK_WORDS, masks_among
from dino_lite.data.paths import Paths
from dino_lite.data.selection import Selection


class PathLayout(NamedTuple):
    """Rows of `Paths` in train and in test, the folder of each path as `Layout` names it, and the
    layout.
    """

    train: Bool[np.ndarray, "N"]
    test: Bool[np.ndarray, "N"]
    folders: list[str]  # by number of the folder in Paths
    layout: Layout


def key_of(folder: bytes) -> str:
    """A folder of a path or URL as `read_layout` names it: "train/cat", "bucket/train"."""
    return os.fsdecode(folder).replace("://", "/").strip("/")


def layout_of(paths: Paths, chosen: Selection) -> PathLayout:
    """Read the layout of `paths`: masks beside photographs in one folder, then the folders."""
    rows_of = _Rows(paths)
    masks = _masks(paths, rows_of) if chosen.automatic else np.zeros(0, np.int64)
    kept = np.ones(len(paths), bool)
    kept[masks] = False
    folders = [key_of(folder) for folder in paths.folders()]
    numbers: dict[str, list[int]] = {}
    for number, key in enumerate(folders):
        numbers.setdefault(key, []).append(number)
    counts = np.bincount(paths.folder_of[kept], minlength=len(folders)).tolist()
    of_key = {key: sum(counts[i] for i in each) for key, each in numbers.items()}

    def names(folder: str) -> list[str]:
        rows = [row for i in numbers.get(folder, ()) for row in rows_of(i).tolist() if kept[row]]
        return paths.file_names(rows)

    of_key = {key: num for key, num in of_key.items() if num}
    layout = read_layout(of_key, names, chosen.train, chosen.test, chosen.automatic)
    if len(masks):
        first = paths.file_names(masks[:1].tolist())[0]
        told = (
            f"{were(len(masks))} left out as masks of the images beside them ({first}): "
            "data.exclude=none takes them in."
        )
        layout = layout._replace(left_out=[*layout.left_out, told])

    def part(chosen_folders: dict[str, list[str]]) -> Bool[np.ndarray, "N"]:
        chosen_numbers = np.array([key in chosen_folders for key in folders], bool)
        found: np.ndarray = chosen_numbers[paths.folder_of] & kept
        return found

    return PathLayout(part(layout.train), part(layout.test), folders, layout)


class _Rows:
    """The rows of each folder, sorted once."""

    def __init__(self, paths: Paths) -> None:
        self._paths = paths
        self._order: Int[np.ndarray, "N"] | None = None
        self._starts: Int[np.ndarray, "F"] | None = None

    def __call__(self, folder: int) -> Int[np.ndarray, "n"]:
        if self._order is None or self._starts is None:
            self._order = np.argsort(self._paths.folder_of, kind="stable")
            counts = self._paths.num_in_folders()
            self._starts = np.concatenate([[0], np.cumsum(counts)])
        return self._order[self._starts[folder] : self._starts[folder + 1]]


def _masks(paths: Paths, rows_of: _Rows) -> Int[np.ndarray, "n"]:
    """Rows of masks that lie in the folder of their photographs."""
    found: list[Sequence[int]] = []
    for folder in paths.folders_that_mention(MASK_WORDS):
        rows = rows_of(folder)
        found.append(rows[masks_among(paths.file_names(rows.tolist()))].tolist())
    return np.sort(np.array([row for rows in found for row in rows], np.int64))
