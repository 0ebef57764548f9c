"""Class labels: from folders, a CSV file, or the data set itself."""

from __future__ import annotations

import csv
import os
import posixpath
from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int, Int64

from dino_lite.contracts import UserError
from dino_lite.data.paths import Paths
from dino_lite.data.sources import text


class Split(NamedTuple):
    """Image files below one folder of the data's root `top`; all are POSIX paths in bytes.

    `folder` is relative to `top` ("train/", or "" for all of it), `paths` are relative to `folder`.
    """

    top: bytes
    folder: bytes
    paths: Paths


class Named(NamedTuple):
    """The class of each image as an index into `names`, which are unordered; -1: none."""

    codes: Int[np.ndarray, "N"]
    names: list[Any]


class Labels(NamedTuple):
    """Class indices of each split, if it is labeled, and the class names."""

    train: Int64[np.ndarray, "N"] | None
    test: Int64[np.ndarray, "M"] | None
    classes: list[str]


NO_LABELS = Labels(None, None, [])


class NameList:
    """Collects the classes of images without creating an object for each."""

    def __init__(self) -> None:
        self._codes = array("i")
        self._known: dict[Any, int] = {}

    def add(self, name: Any) -> None:
        """Append a class, text or integer; None if the image has none."""
        self._codes.append(-1 if name is None else self._known.setdefault(name, len(self._known)))

    def named(self) -> Named:
        """The collected classes."""
        return Named(np.array(self._codes, np.int32), [*self._known])


def encode_labels(train: Sequence[Any] | None, test: Sequence[Any] | None) -> Labels:
    """Names (text or integers) as indices shared by both splits, as in `encode`."""
    return encode(*(None if names is None else _collect(names) for names in (train, test)))


def encode(train: Named | None, test: Named | None) -> Labels:
    """Indices shared by both splits; a split with an unlabeled image gets no labels at all.

    Classes are train's names, sorted, then those only in test, sorted; test may lack some. With
    fewer than two classes in train there are no labels, since one class distinguishes nothing.
    """
    if train is None or (train.codes < 0).any():
        return NO_LABELS
    if test is not None and (test.codes < 0).any():
        test = None
    classes = sorted(_used(train))
    if len(classes) < 2:
        return NO_LABELS
    if test is not None:
        classes += sorted(_used(test) - set(classes))
    index = {name: i for i, name in enumerate(classes)}

    def indices(split: Named) -> Int64[np.ndarray, "K"]:
        number = np.array([*(index.get(name, -1) for name in split.names), -1], np.int64)
        return np.take(number, split.codes)

    return Labels(indices(train), None if test is None else indices(test), [*map(str, classes)])


def encode_known(
    train: Sequence[Any | None], test: Sequence[Any | None], classes: Sequence[str] = ()
) -> Labels:
    """As `encode_labels`, but unnamed images (None) get the label -1.

    `classes`: the names of integer labels, in order, if known.
    """
    known = [[name for name in names if name is not None] for names in (train, test)]
    found = encode_labels(known[0], known[1])
    if found.train is None:
        return NO_LABELS
    numbers = [name for name in known[0] + known[1] if isinstance(name, int)]
    if classes and len(numbers) == len(known[0] + known[1]) and max(numbers) < len(classes):
        found = Labels(np.array(known[0], np.int64), np.array(known[1], np.int64), [*classes])

    labels = [np.full(len(names), -1, np.int64) for names in (train, test)]
    for part, names, indices in zip(labels, (train, test), found[:2], strict=True):
        if indices is not None:
            part[[i for i, name in enumerate(names) if name is not None]] = indices
    return Labels(labels[0], labels[1] if known[1] else None, found.classes)


def find_labels(how: str | None, train: Sequence[Split], test: Sequence[Split]) -> Labels:
    """Labels according to `data.labels`: auto, none, folder or FILE.csv.

    A split may span several roots: a class is the same in all of them. `folder` and FILE.csv must
    provide two classes and label every image of train, and all or none of test; otherwise a
    UserError is raised. `auto` uses the folders, and goes without labels if an image lies in none,
    if there are fewer than two classes, or if a class has one image.
    """
    if how in (None, "none"):
        return NO_LABELS
    demand = "" if how == "auto" else f"data.labels={how}"
    tables: dict[bytes, dict[bytes, str] | None] = {}
    for top, _, _ in (*train, *test):
        if top not in tables:
            by_folder = how in ("auto", "folder")
            tables[top] = None if by_folder else _read_csv(Path(os.fsdecode(top)), str(how))
    of_train = _merge([_names(split, tables[split.top]) for split in train])
    of_test = _merge([_names(split, tables[split.top]) for split in test]) if test else None
    if demand:
        _check(demand, train, of_train)
        _check(demand, test, of_test)
        if len(_used(of_train)) < 2:
            found = ", ".join(f"the class {name} alone" for name in _used(of_train)) or "no class"
            raise UserError(
                f"{demand} finds {found} in {text(train[0].top)}, but needs two: choose "
                "data.labels=none."
            )
    elif (of_train.codes < 0).any() or (np.unique(of_train.codes, return_counts=True)[1] < 2).any():
        return NO_LABELS
    return encode(of_train, of_test)


def _collect(names: Iterable[Any]) -> Named:
    collected = NameList()
    for name in names:
        collected.add(name)
    return collected.named()


def _used(split: Named) -> set[Any]:
    """Names that occur."""
    return {split.names[code] for code in np.unique(split.codes).tolist() if code >= 0}


def _merge(parts: Sequence[Named]) -> Named:
    """Concatenate the images of all parts."""
    known: dict[Any, int] = {}
    codes = [np.zeros(0, np.int32)]
    for part in parts:
        number = [known.setdefault(name, len(known)) for name in part.names]
        codes.append(np.array([*number, -1], np.int32)[part.codes])
    return Named(np.concatenate(codes), [*known])


def _names(split: Split, table: dict[bytes, str] | None) -> Named:
    """Class of each image, from the table or else its first folder."""
    if table is not None:
        return _collect(table.get(split.folder + path) for path in split.paths)
    firsts = [folder.partition(b"/")[0] for folder in split.paths.folders()]
    by_folder = _collect(text(first) if first else None for first in firsts)
    return Named(by_folder.codes[split.paths.folder_of], by_folder.names)


def _check(demand: str, splits: Sequence[Split], found: Named | None) -> None:
    """Labels were requested: all images of a split must have one, or none."""
    if found is None:
        return
    lost = np.flatnonzero(found.codes < 0)
    if 0 < len(lost) < len(found.codes):
        row = int(lost[0])
        for split in splits:
            if row < len(split.paths):
                break
            row -= len(split.paths)
        raise UserError(
            f"{demand} has no class for {len(lost)} of {len(found.codes)} images in "
            f"{text(split.top)}, the first being {text(split.folder + split.paths[row])}: name "
            "them all, or choose data.labels=none."
        )


def _read_csv(root: Path, name: str) -> dict[bytes, str]:
    """Path (relative to `root`) to label. A first row `path,label` is a header."""
    asked = Path(os.path.expanduser(os.path.expandvars(name)))
    file = next((path for path in (root / asked, asked) if path.is_file()), None)
    if file is None:
        raise UserError(
            f"data.labels={name} is not auto, none or folder, nor a CSV file in {root} or in the "
            "working folder: choose one of these."
        )
    table: dict[bytes, str] = {}
    try:
        with open(file, newline="", encoding="utf-8-sig", errors="surrogateescape") as lines:
            for number, row in enumerate(csv.reader(lines), start=1):
                cells = [cell.strip() for cell in row]
                if not any(cells) or (number == 1 and cells[:2] == ["path", "label"]):
                    continue
                if len(cells) < 2 or not cells[0] or not cells[1]:
                    raise UserError(f"Row {number} of {file} is not path,label: fix it.")
                table[os.fsencode(posixpath.normpath(cells[0]))] = cells[1]
    except (OSError, csv.Error) as error:
        raise UserError(
            f"{file} cannot be read as CSV ({error}): it must hold rows of path,label."
        ) from error
    return table
