"""Class labels: from folders, a CSV file, or the data set itself."""

from __future__ import annotations

import csv
import os
import posixpath
from array import array
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int, Int64

from dino_lite.contracts import UserError
from dino_lite.data.paths import Paths
from dino_lite.data.sources import text
from dino_lite.wording import count


class Split(NamedTuple):
    """Image files of one split below the data's root `top`; all are POSIX paths in bytes.

    `folder` is relative to `top` ("train/", or "" for all of it), `paths` are relative to `folder`.
    `classes`: the class that each folder of `paths` names, by its number.
    """

    top: bytes
    folder: bytes
    paths: Paths
    classes: Sequence[str | None]


class Named(NamedTuple):
    """The class of each image as an index into `names`, which are unordered; -1: none."""

    codes: Int[np.ndarray, "N"]
    names: list[Any]

    @classmethod
    def collect(cls, names: Iterable[Any]) -> Named:
        """The classes of images in order, text or integers; None if an image has none."""
        collected = NameList()
        for name in names:
            collected.add(name)
        return collected.named()


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


class Labels(NamedTuple):
    """Class indices of each split, if it is labeled, and the class names.

    `origin`: where they come from, or why a split has none.
    """

    train: Int64[np.ndarray, "N"] | None
    test: Int64[np.ndarray, "M"] | None
    classes: list[str]
    origin: str = ""


NO_LABELS = Labels(None, None, [])


def encode_labels(
    train: Sequence[Any] | None, test: Sequence[Any] | None, origin: str = ""
) -> Labels:
    """Names (text or integers) as indices shared by both splits, as in `encode`."""
    named = [None if names is None else Named.collect(names) for names in (train, test)]
    return encode(named[0], named[1], origin)


def encode(train: Named | None, test: Named | None, origin: str = "") -> Labels:
    """Indices shared by both splits; a split with an unlabeled image gets no labels at all.

    Classes are train's names, sorted, then those only in test, sorted; test may lack some, but has
    no labels if it shares none. With fewer than two classes in train there are no labels, since one
    class distinguishes nothing. `origin` of the names, in the result.
    """
    if train is None or (lost := int((train.codes < 0).sum())):
        return NO_LABELS._replace(origin=_without_label(lost) if train else "the data has none")
    used = _used(train)
    classes = sorted(used)
    if len(classes) < 2:
        why = f"all images are of the class {classes[0]}" if classes else "no image has a label"
        return NO_LABELS._replace(origin=why)
    if test is not None:
        if lost := int((test.codes < 0).sum()):
            test, origin = None, f"{origin}; test has no labels, as {_without_label(lost)} there"
        elif len(test.codes) and not (of_test := _used(test)) & used:
            test = None
            origin += f"; test has no labels, as its classes ({listed(of_test)}) are not in train"
        else:
            classes += sorted(of_test - used) if len(test.codes) else []
    index = {name: i for i, name in enumerate(classes)}

    def indices(split: Named) -> Int64[np.ndarray, "K"]:
        number = np.array([*(index.get(name, -1) for name in split.names), -1], np.int64)
        return np.take(number, split.codes)

    of_test_split = None if test is None else indices(test)
    return Labels(indices(train), of_test_split, [*map(str, classes)], origin.removeprefix("; "))


def _without_label(num: int) -> str:
    return f"{count(num, 'image')} {'has' if num == 1 else 'have'} no label"


def encode_known(
    train: Sequence[Any | None],
    test: Sequence[Any | None],
    classes: Sequence[str] = (),
    origin: str = "",
) -> Labels:
    """As `encode_labels`, but unnamed images (None) get the label -1.

    `classes`: the names of integer labels, in order, if known.
    """
    known = [[name for name in names if name is not None] for names in (train, test)]
    found = encode_labels(known[0], known[1], origin)
    if found.train is None:
        return NO_LABELS._replace(origin=found.origin)
    of_test = bool(known[1]) and found.test is not None
    numbers = [name for name in known[0] + known[1] if isinstance(name, int)]
    if classes and len(numbers) == len(known[0] + known[1]) and max(numbers) < len(classes):
        numbered = np.array(known[1], np.int64) if of_test else None
        found = Labels(np.array(known[0], np.int64), numbered, [*classes], found.origin)
    labels = [np.full(len(names), -1, np.int64) for names in (train, test)]
    for part, names, indices in zip(labels, (train, test), found[:2], strict=True):
        if indices is not None:
            part[[i for i, name in enumerate(names) if name is not None]] = indices
    return Labels(labels[0], labels[1] if of_test else None, found.classes, found.origin)


def find_labels(how: str | None, train: Sequence[Split], test: Sequence[Split]) -> Labels:
    """Labels according to `data.labels`: auto, none, folder or FILE.csv.

    A split may span several roots: a class is the same in all of them. `folder` and FILE.csv must
    provide two classes and label every image of train, and all or none of test; otherwise a
    UserError is raised. `auto` uses the folders, and goes without labels if an image lies in none,
    if there are fewer than two classes, or if a class has one image.
    """
    if how in (None, "none"):
        return NO_LABELS._replace(origin="data.labels=none")
    demand = "" if how == "auto" else f"data.labels={how}"
    tables: dict[bytes, dict[bytes, str] | None] = {}
    for top in {split.top for split in (*train, *test)}:
        by_folder = how in ("auto", "folder")
        tables[top] = None if by_folder else _read_csv(Path(os.fsdecode(top)), str(how))
    of_train = _merge([_names(split, tables[split.top]) for split in train])
    of_test = _merge([_names(split, tables[split.top]) for split in test]) if test else None
    used = _used(of_train)
    if demand:
        _check(demand, train, of_train)
        _check(demand, test, of_test)
        if len(used) < 2:
            found = ", ".join(f"the class {name} alone" for name in used) or "no class"
            raise UserError(
                f"{demand} finds {found} in {text(train[0].top)}, but needs two: choose "
                "data.labels=none."
            )
    elif how == "auto":
        return encode_auto(of_train, of_test, partial(_path, train))
    origin = f"the folders {listed(used)}" if how == "folder" else str(how)
    return encode(of_train, of_test, origin)


def _path(splits: Sequence[Split], row: int) -> str:
    """The path of image `row` of all splits, below its root."""
    for split in splits:
        if row < len(split.paths):
            break
        row -= len(split.paths)
    return text(split.folder + split.paths[row])


def encode_auto(train: Named, test: Named | None, path: Callable[[int], str]) -> Labels:
    """Folders as classes, if each image of train lies in one and each class has two images; or else
    no labels. `path` gives that of an image of train.
    """
    why = _why_none(train, path)
    if why:
        return NO_LABELS._replace(origin=why)
    return encode(train, test, f"the folders {listed(_used(train))}")


def listed(names: Iterable[Any]) -> str:
    """Some of the names, sorted, for a sentence."""
    chosen = sorted(map(str, names))
    more = len(chosen) - _NUM_LISTED
    return ", ".join(chosen[:_NUM_LISTED]) + (f" and {more:,} more" if more > 0 else "")


_NUM_LISTED = 4


def _why_none(found: Named, path: Callable[[int], str]) -> str:
    """Why folders are not taken as classes; "" if they are."""
    lost = np.flatnonzero(found.codes < 0)
    if len(_used(found)) < 2:
        return "all images are in one folder"
    if len(lost):
        name = posixpath.basename(path(int(lost[0])))
        what = f"{count(len(lost), 'image')} {'is' if len(lost) == 1 else 'are'}"
        which = name if len(lost) == 1 else f"the first being {name}"
        return f"{what} in no class folder ({which}): data.exclude=NAME leaves out what is no class"
    codes, counts = np.unique(found.codes, return_counts=True)
    single = [found.names[code] for code in codes[counts == 1].tolist()]
    if not single:
        return ""
    what = f"class {single[0]} has" if len(single) == 1 else f"{count(len(single), 'class')} have"
    of = "" if len(single) == 1 else f" ({listed(single)})"
    return f"{what} one image{of}: data.labels=folder keeps such classes"


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
    """Class of each image, from the table or else its folder."""
    if table is not None:
        return Named.collect(table.get(split.folder + path) for path in split.paths)
    by_folder = Named.collect(split.classes)
    return Named(by_folder.codes[split.paths.folder_of], by_folder.names)


def _check(demand: str, splits: Sequence[Split], found: Named | None) -> None:
    """Labels were requested: all images of a split must have one, or none."""
    if found is None:
        return
    lost = np.flatnonzero(found.codes < 0)
    if 0 < len(lost) < len(found.codes):
        raise UserError(
            f"{demand} has no class for {len(lost)} of {len(found.codes)} images in "
            f"{text(splits[0].top)}, the first being {_path(splits, int(lost[0]))}: name "
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
