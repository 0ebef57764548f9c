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
_Waiting = tuple[bytes, list[bytes], frozenset[_Identity]]  # a folder, files, folders around


class Found(NamedTuple):
    """Image files in byte order, and other files that may hold images by suffix (".tar"), relative
    to the folder; why folders could not be listed; and folders of runs and checks of dino_lite,
    whose pictures are no data.
    """

    images: Paths
    others: dict[str, list[str]]
    unlisted: dict[str, str]
    own: list[str]


def walk(root: bytes, exclude: Sequence[str] = (), junk: bool = False) -> Found:
    """Look through the folder `root`, without hidden files and folders, those that match `exclude`,
    and those of the operating system unless `junk`.

    Symbolic links to folders are followed, except into a folder that contains them. Raises
    UserError if `root` itself cannot be listed.
    """
    images = PathList()
    others: dict[str, list[str]] = {}
    unlisted: dict[str, str] = {}
    own: list[str] = []
    # A stack of folders to list, and of files that precede folders already listed.
    waiting: list[_Waiting] = [(b"", [], frozenset())]
    while waiting:
        below, files, around = waiting.pop()
        if files:
            images.add_names(below, files)
            continue
        folder = os.path.join(root, below[:-1]) if below else root
        try:
            status = os.stat(folder)
            with os.scandir(folder) as listing:
                folders, images_here, more, is_own = _entries(listing)
        except OSError as error:
            if not below:
                raise UserError(
                    f"{text(folder)} cannot be listed ({error.strerror}): check its permissions."
                ) from error
            unlisted[text(below[:-1])] = error.strerror or "unknown error"
            continue
        if (here := (status.st_dev, status.st_ino)) in around:
            continue
        if is_own and below and not junk:
            own.append(text(below[:-1]))
            continue
        if exclude:
            folders, images_here, more = (
                [e for e in each if not matches(os.fsdecode(below + e.rstrip(b"/")), exclude)]
                for each in (folders, images_here, more)
            )
        for name in more:
            suffix = os.path.splitext(name)[1].lower().decode()
            others.setdefault(suffix, []).append(os.fsdecode(below + name))
        if not junk:
            folders = [name for name in folders if not is_junk(os.fsdecode(name[:-1]))]
        waiting.extend(reversed(_in_order(below, folders, sorted(images_here), around | {here})))
    return Found(images.paths(), others, unlisted, own)


def _in_order(
    below: bytes, folders: list[bytes], images: list[bytes], around: frozenset[_Identity]
) -> list[_Waiting]:
    """Work on the folders and images in `below`, in the byte order of their paths."""
    if not folders:
        return [(below, images, around)] if images else []
    found: list[_Waiting] = []
    for is_folder, run in groupby(sorted([*folders, *images]), lambda name: name.endswith(b"/")):
        if is_folder:
            found.extend((below + name, [], around) for name in run)
        else:
            found.append((below, list(run), around))
    return found


def _entries(
    listing: Iterable[os.DirEntry[bytes]],
) -> tuple[list[bytes], list[bytes], list[bytes], bool]:
    """Names of folders, with a slash; of images; of other files that may hold images; and whether
    dino_lite wrote the folder. Only links need a system call.
    """
    folders: list[bytes] = []
    images: list[bytes] = []
    others: list[bytes] = []
    marks: set[bytes] = set()
    for entry in listing:
        name = entry.name
        if name[0] == _DOT:
            continue
        try:
            is_image = name.lower().endswith(_USUAL_FIRST)
            if is_image and entry.is_file():
                images.append(name)
            elif entry.is_dir():
                folders.append(name + b"/")
            elif not is_image and name.lower().endswith(_COLLECTED) and entry.is_file():
                others.append(name)
            elif name in _MARKS:
                marks.add(name)
        except OSError:  # a link to itself
            continue
    return folders, images, sorted(others), b"check.json" in marks or len(marks) > 1


_DOT = ord(".")
_MARKS = {b"config.yaml", b"environment.json", b"check.json"}  # of a run, and of a check
_USUAL_FIRST = (b".jpg", b".jpeg", b".png", *SUFFIXES)
