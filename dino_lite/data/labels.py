"""Where the classes of images come from: their folders, a CSV file, the data itself, or nowhere."""

from __future__ import annotations

import csv
import os
import posixpath
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64

from dino_lite.contracts import UserError


Names = Sequence[str] | Sequence[int]


class Split(NamedTuple):
    """Image files of one folder: `folder` relative to the data's root, `paths` to `folder`. POSIX, in bytes."""

    folder: bytes
    paths: list[bytes]


class Labels(NamedTuple):
    """Class indices of each split, where it has any, and the names they stand for."""

    train: Int64[np.ndarray, "N"] | None = None
    test: Int64[np.ndarray, "M"] | None = None
    classes: list[str] = []


def encode_labels(train: Names | None, test: Names | None) -> Labels:
    """Names as indices that mean the same in both splits. With fewer than two classes in train there are no labels.

    Classes are train's names, sorted, then those that only test has, sorted; test may lack some.
    """
    classes = sorted(set(train or ()))
    if train is None or len(classes) < 2:
        return Labels()
    classes += sorted(set(test or ()) - set(classes))
    index = {name: i for i, name in enumerate(classes)}

    def indices(names: Names) -> Int64[np.ndarray, "K"]:
        return np.fromiter((index[name] for name in names), np.int64, len(names))

    return Labels(indices(train), None if test is None else indices(test), [str(name) for name in classes])


def find_labels(root: Path, how: str | None, train: Split, test: Split | None) -> Labels:
    """Labels as `data.labels` asks for them: auto, none, folder or FILE.csv.

    What is asked for by name must be there, or a UserError says what is missing. `auto` looks at the folders and goes
    without labels where an image lies in none, where there are fewer than two classes, or where one has a single image.
    A test split none of whose images has a class goes without in any case.
    """
    if how in (None, "none"):
        return Labels()
    table = None if how in ("auto", "folder") else _read_csv(root, str(how))
    demand = "" if how == "auto" else f"data.labels={how}"
    names = _names(root, train, table, demand)
    counts = Counter(names)
    if len(counts) < 2 and demand:
        raise UserError(f"{demand} finds {len(counts)} classes in {root}, but two are needed: choose data.labels=none.")
    if names is None or (not demand and min(counts.values()) < 2):
        return Labels()
    return encode_labels(names, None if test is None else _names(root, test, table, demand))


def _names(root: Path, split: Split, table: dict[bytes, str] | None, demand: str) -> list[str] | None:
    """Class of each image by the table or, without one, its first folder; None unless all images have one."""
    found = []
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
            f"{demand} has no class for {len(found) - len(named)} of the {len(found)} images in {root}, the first "
            f"being {lost}: name them all, or choose data.labels=none."
        )
    return named if len(named) == len(found) else None


def _read_csv(root: Path, name: str) -> dict[bytes, str]:
    """Path (relative to `root`) to label. A first row `path,label` is a heading; further columns are not read."""
    asked = Path(os.path.expanduser(os.path.expandvars(name)))
    file = next((path for path in (root / asked, asked) if path.is_file()), None)
    if file is None:
        raise UserError(
            f"data.labels={name} is neither auto, none, folder nor a CSV file in {root} or the working folder."
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
        raise UserError(f"{file} cannot be read as CSV ({error}): it must hold rows of path,label.") from error
    return table


def text(path: bytes) -> str:
    """A path for people; bytes that are no UTF-8 are written \\xNN."""
    return path.decode("utf-8", "backslashreplace")
