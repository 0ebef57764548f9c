"""Resolves `data.root`: a folder or file, several of them, or a pattern."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from dino_lite.contracts import UserError
from dino_lite.data.sources import expand

Root = str | Path | Sequence[str | Path]


class Top(NamedTuple):
    """A folder to search for images: all of it, or only the files that matched a pattern."""

    folder: str
    files: list[str] | None = None


def is_url(root: object) -> bool:
    """Whether `root` is s3://…, https://… and the like."""
    return isinstance(root, str) and "://" in root


def several(root: object) -> list[str | Path] | None:
    """The items of a list, or of a text written `[a,b]` that is not itself a path; None otherwise.

    In a text, a path containing a comma must be quoted: `['a,b',c]`.
    """
    if isinstance(root, str):
        listed = len(root) > 2 and root[0] == "[" and root[-1] == "]"
        if not listed or expand(root).exists():
            return None
        parts = re.finditer(r"(?:^|,)\s*(?:'([^']*)'|\"([^\"]*)\"|([^,]*))", root[1:-1])
        return [(part[1] or part[2] or part[3] or "").strip() for part in parts]
    return None if root is None or isinstance(root, Path) else [*root]  # type: ignore[misc]


def is_pattern(root: object) -> bool:
    """Whether `root` is one path with *, ? or [], and no file of that name exists."""
    if root is None or is_url(root) or several(root) is not None:
        return False
    return glob.has_magic(str(root)) and not expand(root).exists()


def absolute(root: object) -> object:
    """`root` made independent of the working folder: a string, or a list of strings.

    A path that does not exist and is no pattern is unchanged: it may be another kind of name.
    """
    parts = several(root)
    if parts is not None:
        return [absolute(part) for part in parts]
    if not root or is_url(root):
        return root
    path = expand(root)
    if is_pattern(root):
        return str(path)
    written = Path(os.path.expandvars(str(root))).expanduser()
    return str(path.resolve()) if path.exists() or written.is_absolute() else root


def tops(root: object) -> list[Top]:
    """The folders at `root`, in its order (of a pattern: sorted), each file once.

    A folder inside another one counts as part of that. Files that match a pattern belong to the
    folder that the pattern starts with.
    """
    parts = several(root)
    found = [top for part in ([root] if parts is None else parts) for top in _tops(part)]
    if not found:
        raise UserError("data.root=[] names nothing: name the folders that hold the images.")
    whole = {top.folder for top in found if top.files is None}
    seen: set[str] = set()
    kept = []
    for folder, files in found:
        named = [folder] if files is None else files
        new = [path for path in named if path not in seen and not _within(path, whole)]
        seen.update(new)
        if new:
            kept.append(Top(folder, files and new))
    return kept


def _tops(root: object) -> list[Top]:
    if is_url(root):
        raise UserError(
            f"data.root={root}: a folder behind a URL cannot be listed; write a list of its files "
            "(.csv, .tsv, .parquet, .txt) and give that."
        )
    path = expand(root)
    if path.is_dir():
        return [Top(str(path))]
    if path.exists() or not is_pattern(root):
        what = "is not a folder" if path.exists() else "does not exist"
        raise UserError(f"data.root={path} {what}: name a folder of images.")
    matched = sorted(map(os.path.normpath, glob.glob(str(path), recursive=True)))
    if not matched:
        raise UserError(f"data.root={path} matches nothing: check the pattern.")
    folders = [match for match in matched if os.path.isdir(match)]
    files = sorted({*matched}.difference(folders))
    plain = str(path)
    while glob.has_magic(plain):
        plain = os.path.dirname(plain)
    return [*map(Top, folders), *([Top(plain, files)] if files else [])]


def _within(path: str, folders: set[str]) -> bool:
    """Whether `path` lies below one of `folders`."""
    while folders and (parent := os.path.dirname(path)) != path:
        if parent in folders:
            return True
        path = parent
    return False
