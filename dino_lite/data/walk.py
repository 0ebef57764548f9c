"""One pass over a folder: its image files, and what else may hold images."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

from dino_lite.contracts import UserError
from dino_lite.data.folder_names import is_junk, matches
from dino_lite.data.paths import PathList, Paths
from dino_lite.data.sources import text
from dino_lite.data.suffixes import KNOWN, SUFFIXES

ARCHIVES = (".zip", ".rar", ".7z", ".gz", ".tgz", ".bz2", ".xz", ".zst")
_COLLECTED = (b".tar", b".parquet", b".arrow", *map(str.encode, ARCHIVES), *KNOWN)

_Identity = tuple[int, int]  # device and inode of a folder


class Found(NamedTuple):
    """Image files in byte order, and other files that may hold images by suffix (".tar"), relative
    to the folder; and why folders could not be listed.
    """

    images: Paths
    others: dict[str, list[str]]
    unlisted: dict[str, str]


def walk(root: bytes, exclude: Sequence[str] = (), junk: bool = False) -> Found:
    """Look through the folder `root`, without hidden files and folders, those that match `exclude`,
    and those of the operating system unless `junk`.

    Symbolic links to folders are followed, except into a folder that contains them. Raises
    UserError if `root` itself cannot be listed.
    """
    images = PathList()
    others: dict[str, list[str]] = {}
    unlisted: dict[str, str] = {}
    # A stack of folders to list, and of files that precede folders already listed.
    waiting: list[tuple[bytes, list[bytes], frozenset[_Identity]]] = [(b"", [], frozenset())]
    while waiting:
        below, files, around = waiting.pop()
        if files:
            images.add_names(below, files)
            continue
        folder = os.path.join(root, below[:-1]) if below else root
        try:
            status = os.stat(folder)
            with os.scandir(folder) as listing:
                entries = [entry for entry in map(_entry, listing) if entry]
        except OSError as error:
            if not below:
                raise UserError(
                    f"{text(folder)} cannot be listed ({error.strerror}): check its permissions."
                ) from error
            unlisted[text(below[:-1])] = error.strerror or "unknown error"
            continue
        if (here := (status.st_dev, status.st_ino)) in around:
            continue
        if exclude:
            entries = [
                e for e in entries if not matches(os.fsdecode(below + e.rstrip(b"/")), exclude)
            ]
        found: list[tuple[bytes, list[bytes], frozenset[_Identity]]] = []
        for kind, run in groupby(sorted(entries), _kind):
            if kind == b"/":
                named = [name for name in run if junk or not is_junk(os.fsdecode(name[:-1]))]
                found.extend((below + name, [], around | {here}) for name in named)
            elif kind:
                others.setdefault(kind.decode(), []).extend(
                    os.fsdecode(below + name) for name in run
                )
            else:
                found.append((below, list(run), around))
        waiting.extend(reversed(found))
    return Found(images.paths(), others, unlisted)


def _entry(entry: os.DirEntry[bytes]) -> bytes | None:
    """A folder's name with a slash, the name of a file that may hold images, or None; only links
    need a system call.
    """
    if entry.name.startswith(b"."):
        return None
    try:
        if entry.is_dir():
            return entry.name + b"/"
        if entry.name.lower().endswith(_NAMED) and entry.is_file():
            return entry.name
    except OSError:  # a link to itself
        pass
    return None


_NAMED = SUFFIXES + _COLLECTED


def _kind(entry: bytes) -> bytes:
    """`/` for a folder, the suffix of a file that is none of an image, else nothing."""
    if entry.endswith(b"/"):
        return b"/"
    suffix = os.path.splitext(entry)[1].lower()
    return suffix if suffix in _COLLECTED else b""
