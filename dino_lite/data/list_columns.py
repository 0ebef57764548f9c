"""Which columns of a list of files hold the path, the label and the split."""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from dino_lite.contracts import UserError
from dino_lite.data.folder_names import split_of
from dino_lite.data.suffixes import SUFFIXES

# Names of columns, without case and separators.
_PATHS = (
    *("path", "filename", "file", "filepath", "image", "imagepath", "imagename", "imgname", "img"),
    *("imageid", "imgid", "id", "idcode"),
)
_LABELS = (
    *("class", "classes", "classname", "classid", "labelname", "labels", "species", "breed"),
    *("category", "categoryname", "genus", "family", "variety", "cultivar", "diagnosis", "dx"),
    *("target", "cls"),
)
_SPLITS = ("split", "set", "subset", "partition")
_SEPARATORS = ",;\t|"
_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".JPG", ".JPEG", ".PNG")


class Columns(NamedTuple):
    """Positions of the columns, None if missing, and why there is no label."""

    path: int
    label: int | None = None
    split: int | None = None
    why_unlabeled: str = "the list has no column of labels"


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
    if any(map(looks_like_path, first)):
        return False
    known = {*_PATHS, *_LABELS, *_SPLITS, "label"}
    if known.intersection(map(_plain, first)):
        return True
    return not any("/" in cell for cell in first) and any(map(looks_like_path, second or ()))


def _plain(name: str) -> str:
    return "".join(c for c in name.lower() if c.isalnum())


def find_columns(
    names: Sequence[str], rows: Sequence[Sequence[str]], where: str, asked: Asked
) -> Columns:
    """The columns of a list by the `names` in its heading and some of its first `rows`. Raises
    UserError if none or several may hold the path, or several the label.
    """
    plain = [_plain(name) for name in names]
    path = _path_column(names, plain, rows[0] if rows else (), where, asked.path)
    split = plain.index("split") if "split" in plain else None
    for name in _SPLITS[1:]:  # they may mean something else
        if split is None and name in plain:
            column = plain.index(name)
            said = [split_of(row[column]) for row in rows if len(row) > column]
            split = column if said and all(said) else None
    label, why = _label_column(names, plain, where, asked.label, path)
    return Columns(path, label, split, why)


def plain_columns(first: Sequence[str], where: str, asked: Asked) -> Columns:
    """Path, label and split of a CSV without a heading, whose first row is `first`."""
    paths = [i for i, cell in enumerate(first) if looks_like_path(cell)]
    if asked != Asked() or len(first) > 3 or (paths and paths[0] != 0):
        raise UserError(
            f"{where} has no heading that is known: its first row must name the columns, as "
            "path,label,split."
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


def missing_suffix(path: bytes, base: bytes, where: str) -> bytes:
    """What the first path of a list lacks to be that of a file: nothing, or a suffix, which all
    lack then. Raises UserError if it has no suffix of an image and is not the name of a file.
    """
    place = os.path.join(base, path)
    if looks_like_path(os.fsdecode(path)) or b"://" in place or os.path.isfile(place):
        return b""
    for suffix in map(str.encode, _SUFFIXES):
        if os.path.isfile(place + suffix):
            return suffix
    raise UserError(
        f"{where} names {os.fsdecode(path)!r} as its first image, and there is no such file, also "
        "not with the suffix of an image: name the column of paths as data.path_column, or the "
        "folder they are in: data=files data.base=FOLDER."
    )


def _path_column(
    names: Sequence[str], plain: Sequence[str], sample: Sequence[str], where: str, asked: str | None
) -> int:
    if asked is not None:
        return _position(names, asked, where, "path_column")
    if "path" in plain:
        return plain.index("path")
    images = [i for i, cell in enumerate(sample[: len(names)]) if looks_like_path(cell)]
    known = [i for i, name in enumerate(plain) if name in _PATHS]
    both = [i for i in images if i in known]
    for found in (images, both, [] if images else known):
        if len(found) == 1:
            return found[0]
    several = ", ".join(names[i] for i in images or known)
    raise UserError(
        f"{where} has {'no column path' if not several else f'the columns {several}'}: name the "
        f"one with the images' paths as data.path_column, of {', '.join(names)}."
    )


def _label_column(
    names: Sequence[str], plain: Sequence[str], where: str, asked: str | None, path: int
) -> tuple[int | None, str]:
    if asked == "none":
        return None, "data.label_column=none"
    if asked is not None:
        return _position(names, asked, where, "label_column"), ""
    if "label" in plain:
        return plain.index("label"), ""
    found = [i for i, name in enumerate(plain) if name in _LABELS and i != path]
    if len(found) > 1:
        raise UserError(
            f"{where} has the columns {', '.join(names[i] for i in found)}: name the one with the "
            "labels as data.label_column, or none."
        )
    others = [name for i, name in enumerate(names) if i != path and plain[i] not in _SPLITS]
    why = f"none of the columns {', '.join(others)} is called label: data.label_column names it"
    return (found[0], "") if found else (None, why if others else Columns(0).why_unlabeled)


def _position(names: Sequence[str], asked: str, where: str, key: str) -> int:
    lower = [name.lower() for name in names]
    if str(asked).lower() not in lower:
        has = ", ".join(names)
        raise UserError(f"data.{key}={asked} is no column of {where}, which has {has}.")
    return lower.index(str(asked).lower())
