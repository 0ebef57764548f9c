"""Which columns of a list of files hold the path, the label and the split."""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from dino_lite.contracts import UserError
from dino_lite.data.suffixes import SUFFIXES

_PATHS = (
    *("path", "file_name", "filename", "file", "filepath", "file_path", "image", "image_path"),
    *("image_name", "img", "image_id", "id"),
)
_LABELS = (
    *("class", "classes", "class_name", "label_name", "labels", "species", "breed", "category"),
    *("category_name", "genus", "family", "variety", "cultivar", "diagnosis", "dx", "target"),
)
_SPLITS = ("split", "set", "subset", "partition")
_SEPARATORS = ",;\t"


class Columns(NamedTuple):
    """Positions of the columns, None if missing, and why there is no label."""

    path: int
    label: int | None = None
    split: int | None = None
    why_unlabeled: str = "the list has no column of labels"
    certain: bool = True  # whether the first cells are known to be paths


class Asked(NamedTuple):
    """The columns that the user names: `data.path_column`, `data.label_column`."""

    path: str | None = None
    label: str | None = None


def separator_of(line: str, suffix: str) -> str:
    """The separator of a CSV's first line: the most frequent of comma, semicolon and tab."""
    best = max(_SEPARATORS, key=line.count)
    if suffix == ".tsv" and "\t" in line:
        return "\t"
    return best if best in line else "\t" if suffix == ".tsv" else ","


def looks_like_path(cell: str) -> bool:
    """Whether the text ends in the suffix of an image; of a URL, its query does not count."""
    name = cell.partition("?")[0] if "://" in cell else cell
    return posixpath.splitext(name.lower())[1].encode() in SUFFIXES


def is_heading(first: Sequence[str], second: Sequence[str] | None) -> bool:
    """Whether the first row of a CSV is a heading: it holds no path, but a known name, or the
    second row holds a path.
    """
    if any(map(looks_like_path, first)) or any("/" in cell for cell in first):
        return False
    known = {*_PATHS, *_LABELS, *_SPLITS, "label"}
    return bool(known.intersection(map(str.lower, first))) or any(
        map(looks_like_path, second or ())
    )


def find_columns(names: Sequence[str], sample: Sequence[str], where: str, asked: Asked) -> Columns:
    """The columns of a list by the `names` in its heading and a `sample` row. Raises UserError if
    none or several may hold the path, or several the label.
    """
    lower = [name.lower() for name in names]
    path, certain = _path_column(lower, sample, where, asked.path)
    split = next((lower.index(name) for name in _SPLITS if name in lower), None)
    label, why = _label_column(lower, where, asked.label, path)
    return Columns(path, label, split, why, certain)


def plain_columns(first: Sequence[str], where: str, asked: Asked) -> Columns:
    """Path, label and split of a CSV without a heading, whose first row is `first`."""
    if asked != Asked() or len(first) > 3:
        raise UserError(
            f"{where} has no heading: its first row must name the columns, as path,label,split."
        )
    return Columns(0, 1 if len(first) > 1 else None, 2 if len(first) > 2 else None)


def encoder(base: bytes) -> Callable[[str], bytes]:
    """A function from paths in a CSV, with escaped bytes that are not UTF-8, to those of files.

    If such a path below `base` does not exist, but is there in UTF-8, the list is in Latin-1.
    """
    recode: bool | None = None

    def encoded(path: str) -> bytes:
        nonlocal recode
        name = os.fsencode(path)
        if path.isascii() or "://" in path or (plain := readable(path)) == path:
            return name
        if recode is None:
            there = [os.path.exists(os.path.join(base, each)) for each in (name, plain.encode())]
            recode = there == [False, True]
        return plain.encode() if recode else name

    return encoded


def readable(text: str) -> str:
    """`text` with escaped bytes, which are not UTF-8, read as Latin-1."""
    return text if text.isascii() else re.sub("[\udc80-\udcff]", _as_latin_1, text)


def _as_latin_1(escaped: re.Match[str]) -> str:
    return bytes([ord(escaped[0]) - 0xDC00]).decode("cp1252", "replace")


def check_first(path: bytes, base: bytes, where: str) -> None:
    """Raise UserError unless the first path of a list, which may be none, is a file or a URL."""
    if b"://" not in os.path.join(base, path) and not os.path.isfile(os.path.join(base, path)):
        raise UserError(
            f"{where} names {os.fsdecode(path)!r} as its first image, and there is no such file: "
            "name the column with the images' paths as data.path_column, with their suffixes."
        )


def _path_column(
    names: Sequence[str], sample: Sequence[str], where: str, asked: str | None
) -> tuple[int, bool]:
    if asked is not None:
        return _position(names, asked, where, "path_column"), True
    if "path" in names:
        return names.index("path"), True
    images = [i for i, cell in enumerate(sample[: len(names)]) if looks_like_path(cell)]
    known = [i for i, name in enumerate(names) if name in _PATHS]
    both = [i for i in images if i in known]
    for found in (images, both, [] if images else known):
        if len(found) == 1:
            return found[0], bool(images)
    several = ", ".join(names[i] for i in images or known)
    raise UserError(
        f"{where} has {'no column path' if not several else f'the columns {several}'}: name the "
        f"one with the images' paths as data.path_column, of {', '.join(names)}."
    )


def _label_column(
    names: Sequence[str], where: str, asked: str | None, path: int
) -> tuple[int | None, str]:
    if asked == "none":
        return None, "data.label_column=none"
    if asked is not None:
        return _position(names, asked, where, "label_column"), ""
    if "label" in names:
        return names.index("label"), ""
    found = [i for i, name in enumerate(names) if name in _LABELS and i != path]
    if len(found) > 1:
        raise UserError(
            f"{where} has the columns {', '.join(names[i] for i in found)}: name the one with the "
            "labels as data.label_column, or none."
        )
    others = [name for i, name in enumerate(names) if i != path and name not in _SPLITS]
    why = f"none of the columns {', '.join(others)} is called label: data.label_column names it"
    return (found[0], "") if found else (None, why if others else Columns(0).why_unlabeled)


def _position(names: Sequence[str], asked: str, where: str, key: str) -> int:
    if asked.lower() not in names:
        has = ", ".join(names)
        raise UserError(f"data.{key}={asked} is no column of {where}, which has {has}.")
    return names.index(asked.lower())
