"""Memory-efficient storage for millions of paths."""

from __future__ import annotations

import os
import re
from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise

import numpy as np
from jaxtyping import Bool, Int, Shaped, UInt8

from dino_lite.data.shared import share

_AT_ONCE = 2**16  # paths decoded at a time in iteration


class Paths:
    """Paths as bytes, POSIX or URLs, in order of insertion. Made by `PathList`.

    A path is split into a folder, up to and including the last slash, and a file name. Every folder
    is stored once; names are concatenated in one array. Long arrays are shared by all processes
    (`share`).
    """

    def __init__(
        self,
        folders: Sequence[bytes],
        folder_of: Shaped[np.ndarray, "N"],
        names: UInt8[np.ndarray, "bytes"],
        bounds: Shaped[np.ndarray, "ends"],
    ) -> None:
        self.folder_of = share(_small(folder_of, len(folders)))
        self._names = share(names)
        self._bounds = share(_small(bounds, len(names)))
        self._folders = share(np.frombuffer(b"".join(folders), np.uint8))
        self._folder_bounds = share(_small(_ends(map(len, folders)), len(self._folders)))

    def __len__(self) -> int:
        return len(self.folder_of)

    def __getitem__(self, index: int) -> bytes:
        start, stop = self._bounds[index], self._bounds[index + 1]
        return self.folder(int(self.folder_of[index])) + self._names[start:stop].tobytes()

    def __iter__(self) -> Iterator[bytes]:
        folders = self.folders()
        for start in range(0, len(self), _AT_ONCE):
            ends = self._bounds[start : start + _AT_ONCE + 1].tolist()
            names = self._names[ends[0] : ends[-1]].tobytes()
            numbers = self.folder_of[start : start + _AT_ONCE].tolist()
            for number, (cut, end) in zip(numbers, pairwise(ends), strict=True):
                yield folders[number] + names[cut - ends[0] : end - ends[0]]

    @property
    def num_folders(self) -> int:
        """Number of distinct folders, some of which may be unused."""
        return len(self._folder_bounds) - 1

    def folder(self, number: int) -> bytes:
        """Folder `number`, an entry of `folder_of`: empty, or ending in a slash."""
        start, stop = self._folder_bounds[number], self._folder_bounds[number + 1]
        return self._folders[start:stop].tobytes()

    def folders(self) -> list[bytes]:
        """All folders, by number."""
        return [self.folder(number) for number in range(self.num_folders)]

    def where(self, rows: Bool[np.ndarray, "N"], without: bytes = b"") -> tuple[Paths, list[int]]:
        """The paths of these rows, in order, without their common beginning `without`; and the
        numbers that their folders had.
        """
        if rows.all() and not without:
            return self, list(range(self.num_folders))
        of_row = self.folder_of[rows]
        used = np.flatnonzero(np.bincount(of_row, minlength=self.num_folders)).tolist()
        number = np.zeros(self.num_folders, np.int64)
        number[used] = np.arange(len(used))
        lengths: np.ndarray = np.diff(self._bounds.astype(np.int64))
        found = Paths(
            [self.folder(i)[len(without) :] for i in used],
            number[of_row],
            self._names[np.repeat(rows, lengths)],
            np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths[rows])]),
        )
        return found, used

    def folders_that_mention(self, words: Sequence[bytes]) -> list[int]:
        """The folders with a file whose name contains one of these words in lower case."""
        pattern = re.compile(b"|".join(map(re.escape, words)))
        places = [found.start() for found in pattern.finditer(self._names.tobytes().lower())]
        rows = np.searchsorted(self._bounds, places, "right") - 1
        return np.unique(self.folder_of[rows]).tolist() if places else []

    def file_names(self, rows: Iterable[int]) -> list[str]:
        """The names of files without their folders."""
        bounds, names = self._bounds, self._names
        return [os.fsdecode(names[bounds[i] : bounds[i + 1]].tobytes()) for i in rows]

    def num_in_folders(self) -> Int[np.ndarray, "folders"]:
        """The number of paths directly in each folder."""
        return np.bincount(self.folder_of, minlength=self.num_folders)


class PathList:
    """Builds Paths without creating an object per path."""

    def __init__(self) -> None:
        self._folders: dict[bytes, int] = {}
        self._folder_of = array("I")
        self._names = bytearray()
        self._lengths = array("I")

    def __len__(self) -> int:
        return len(self._lengths)

    def add(self, path: bytes) -> None:
        """Append a path."""
        cut = path.rfind(b"/") + 1
        self._folder_of.append(self._folders.setdefault(path[:cut], len(self._folders)))
        self._names += path[cut:]
        self._lengths.append(len(path) - cut)

    def add_names(self, folder: bytes, names: Sequence[bytes]) -> None:
        """Append files of one `folder`, which is empty or ends in a slash."""
        number = self._folders.setdefault(folder, len(self._folders))
        self._folder_of.extend([number] * len(names))
        self._names += b"".join(names)
        self._lengths.extend(map(len, names))

    def paths(self) -> Paths:
        """The collected paths."""
        return Paths(
            list(self._folders),
            np.frombuffer(self._folder_of, np.uintc),
            np.frombuffer(self._names, np.uint8),
            _ends(self._lengths),
        )


def joined(parts: Sequence[tuple[bytes, Paths]]) -> Paths:
    """Concatenate the paths of all parts, each prefixed with its folder."""
    folders = [top + name for top, paths in parts for name in paths.folders()]
    starts = _ends(paths.num_folders for _, paths in parts)
    ends = _ends(len(paths._names) for _, paths in parts)
    empty = np.zeros(0, np.int64)
    folder_of = [
        paths.folder_of.astype(np.int64) + start
        for (_, paths), start in zip(parts, starts, strict=False)
    ]
    bounds = [
        paths._bounds[1:].astype(np.int64) + end
        for (_, paths), end in zip(parts, ends, strict=False)
    ]
    return Paths(
        folders,
        np.concatenate([empty, *folder_of]),
        np.concatenate([empty.astype(np.uint8), *(paths._names for _, paths in parts)]),
        np.concatenate([np.zeros(1, np.int64), *bounds]),
    )


def _ends(lengths: Iterable[int]) -> Int[np.ndarray, "ends"]:
    """Cumulative sum of the lengths, starting with 0."""
    if isinstance(lengths, array):
        each = np.frombuffer(lengths, np.uintc) if len(lengths) else np.zeros(0, np.uintc)
    else:
        each = np.fromiter(lengths, np.int64)
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(each, dtype=np.int64)])


def _small(numbers: Shaped[np.ndarray, "K"], largest: int) -> Shaped[np.ndarray, "K"]:
    """`numbers`, none above `largest`, in the smallest dtype that holds them."""
    return numbers.astype(np.min_scalar_type(largest))
