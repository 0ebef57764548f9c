"""One pass over a folder: its image files, and what else may hold images."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
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
                entries, more = _entries(listing)
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
            entries, more = (
                [e for e in each if not matches(os.fsdecode(below + e.rstrip(b"/")), exclude)]
                for each in (entries, more)
            )
        for name in more:
            suffix = os.path.splitext(name)[1].lower().decode()
            others.setdefault(suffix, []).append(os.fsdecode(below + name))
        found: list[tuple[bytes, list[bytes], frozenset[_Identity]]] = []
        for is_folder, run in groupby(sorted(entries), lambda entry: entry.endswith(b"/")):
            if is_folder:
                named = [name for name in run if junk or not is_junk(os.fsdecode(name[:-1]))]
                found.extend((below + name, [], around | {here}) for name in named)
            else:
                found.append((below, list(run), around))
        waiting.extend(reversed(found))
    return Found(images.paths(), others, unlisted)


def _entries(listing: Iterable[os.DirEntry[bytes]]) -> tuple[list[bytes], list[bytes]]:
    """Names of folders, with a slash, and of images; and names of other files that may hold images.
    Only links need a system call.
    """
    entries: list[bytes] = []
    others: list[bytes] = []
    for entry in listing:
        name = entry.name
        if name.startswith(b"."):
            continue
        try:
            if entry.is_dir():
                entries.append(name + b"/")
            elif (lower := name.lower()).endswith(SUFFIXES):
                if entry.is_file():
                    entries.append(name)
            elif lower.endswith(_COLLECTED) and entry.is_file():
                others.append(name)
        except OSError:  # a link to itself
            continue
    return entries, sorted(others)
