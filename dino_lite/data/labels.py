"""Where the classes of images come from: their folders, a CSV file, the data itself, or nowhere."""

from __future__ import annotations

import csv
import os
import posixpath
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int64

from dino_lite.contracts import UserError


class Split(NamedTuple):
    """Image files of one folder, all POSIX paths in bytes.

    `folder` is relative to the data's root ("" for the root itself), `paths` to `folder`.
    """

    folder: bytes
    paths: list[bytes]


class Labels(NamedTuple):
    """Class indices of each split, where it has any, and the names they stand for."""

    train: Int64[np.ndarray, "N"] | None
    test: Int64[np.ndarray, "M"] | None
    classes: list[str]


NO_LABELS = Labels(None, None, [])


def encode_labels(train: Sequence[Any] | None, test: Sequence[Any] | None) -> Labels:
    """Names (text or integers) as indices that mean the same in both splits.

    Classes are train's names, sorted, then those that only test has, sorted; test may lack some.
    One class tells nothing apart: with fewer than two in train there are no labels.
    """
    classes = sorted(set(train or ()))
    if train is None or len(classes) < 2:
        return NO_LABELS
    classes += sorted(set(test or ()) - set(classes))
    index = {name: i for i, name in enumerate(classes)}

    def indices(names: Sequence[Any]) -> Int64[np.ndarray, "K"]:
        return np.fromiter((index[name] for name in names), np.int64, len(names))

    return Labels(indices(train), None if test is None else indices(test), [*map(str, classes)])


def encode_known(
    train: Sequence[Any | None], test: Sequence[Any | None], classes: Sequence[str] = ()
) -> Labels:
    """As `encode_labels`, where some images have no name (None): the label of these is -1.

    `classes`: what integer names stand for, in order, where that is known.
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


def find_labels(root: Path, how: str | None, train: Split, test: Split | None) -> Labels:
    """Labels as `data.labels` asks for them: auto, none, folder or FILE.csv.

    `folder` and FILE.csv must name two classes and every image of train, and of test all or none;
    what they lack is a UserError. `auto` looks at the folders, and goes without labels where an
    image lies in none, where there are fewer than two classes, or where a class has one image.
    """
    if how in (None, "none"):
        return NO_LABELS
    table = None if how in ("auto", "folder") else _read_csv(root, str(how))
    demand = "" if how == "auto" else f"data.labels={how}"
    of_train = _names(root, train, table, demand)
    of_test = None if test is None else _names(root, test, table, demand)
    counts = Counter(of_train)
    if demand and len(counts) < 2:
        found = f"the class {of_train[0]} alone" if of_train else "no class"
        raise UserError(
            f"{demand} finds {found} in {root}, but needs two: choose data.labels=none."
        )
    if not demand and min(counts.values(), default=0) < 2:
        return NO_LABELS
    return encode_labels(of_train, of_test)


def text(path: bytes) -> str:
    """A path for people; bytes that are no UTF-8 are written \\xNN."""
    return path.decode("utf-8", "backslashreplace")


def _names(
    root: Path, split: Split, table: dict[bytes, str] | None, demand: str
) -> list[str] | None:
    """Class of each image, from the table or else its first folder; None unless all have one.

    Where classes are in demand, it is an error that some images have one and others do not.
    """
    found: list[str | None] = []
    for path in split.paths:
        if table is None:
            first, _, below = path.partition(b"/")
            found.append(text(first) if below else None)
        else:
            found.append(table.get(posixpath.join(split.folder, path)))
    named = [name for name in found if name is not None]
    if demand and 0 < len(named) < len(found):
        lost = text(posixpath.join(split.folder, split.paths[found.index(None)]))
        raise UserError(
            f"{demand} has no class for {len(found) - len(named)} of {len(found)} images in "
            f"{root}, the first being {lost}: name them all, or choose data.labels=none."
        )
    return named if len(named) == len(found) else None


def _read_csv(root: Path, name: str) -> dict[bytes, str]:
    """Path (relative to `root`) to label. A first row `path,label` is a heading."""
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
                    raise UserError(f"Row {number} of {file} is not path,label: mend it.")
                table[os.fsencode(posixpath.normpath(cells[0]))] = cells[1]
    except (OSError, csv.Error) as error:
        raise UserError(
            f"{file} cannot be read as CSV ({error}): it must hold rows of path,label."
        ) from error
    return table
