"""A folder of images, whatever its nesting."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np
from jaxtyping import Int64
from PIL import Image

from dino_lite.contracts import Splits, UserError
from dino_lite.data.decode import decode, upright_size
from dino_lite.data.labels import Split, find_labels, text
from dino_lite.data.sources import digest, expand

# What Pillow reads by itself and people store pictures in.
SUFFIXES = tuple(
    b".avif .bmp .gif .jfif .jp2 .jpe .jpeg .jpg .pbm .pgm .png .pnm .ppm .tga .tif .tiff .webp".split()
)


def open_folder(root: str | None = None, labels: str | None = "auto") -> Splits:
    """The images below `root`, ordered by the bytes of their paths; hidden files and folders are left out.

    Splits: `root/train` beside `root/val` or `root/test`, or alone. Of val and test the first that holds images is
    the test split (ImageNet's `test` has no labels). Without such folders all images are train.

    Classes: the first folder below the split, or what `labels` says (auto, none, folder, FILE.csv; see
    `labels.find_labels`; paths in the CSV are relative to `root`).
    """
    top = expand(root)
    if not top.is_dir():
        what = "is not a folder" if top.exists() else "does not exist"
        raise UserError(f"data.root={top} {what}: name a folder of images.")
    paths = sorted(_image_paths(os.fsencode(top)))
    if not paths:
        raise UserError(f"{top} holds no image file (.jpg, .png and the like; hidden ones do not count): check data.root.")
    train, test = _split(top, paths)
    found = find_labels(top, labels, train, test)
    return Splits(
        FolderSource(top, train, found.train, found.classes),
        None if test is None else FolderSource(top, test, found.test, found.classes),
        top.name or "root",
    )


class FolderSource:
    """Image files of one split. Paths lie end to end in one buffer: a million of them are two objects to a worker."""

    def __init__(
        self, root: Path, split: Split, labels: Int64[np.ndarray, "N"] | None, classes: list[str]
    ) -> None:
        self.root = os.path.join(os.fsencode(root), split.folder)
        self.labels = labels
        self.classes = classes
        self._joined = b"".join(split.paths)
        self._bounds = np.cumsum([0, *map(len, split.paths)], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._bounds) - 1

    def path(self, index: int) -> bytes:
        """Path of image `index` below the split's folder; bytes, for a name need not be UTF-8."""
        return self._joined[self._bounds[index] : self._bounds[index + 1]]

    def read(self, index: int) -> Image.Image:
        """Image `index`, upright and RGB. Raises OSError or ValueError where it cannot be read."""
        with self._open(index) as file:
            return decode(file)

    def size(self, index: int) -> tuple[int, int]:
        """Height and width of image `index`, from its header. Raises as `read` does."""
        with self._open(index) as file:
            return upright_size(file)

    def name(self, index: int) -> str:
        """The whole path of image `index`."""
        return text(os.path.join(self.root, self.path(index)))

    def digest(self) -> str:
        """16 hex digits over the paths below the split's folder: the whole may move."""
        return digest(self.path(index) for index in range(len(self)))

    def _open(self, index: int) -> IO[bytes]:
        return open(os.path.join(self.root, self.path(index)), "rb")


def _image_paths(root: bytes) -> Iterator[bytes]:
    """Paths of the image files below `root`, relative to it, in no order. Links are followed, but into no circle."""
    waiting: list[tuple[bytes, frozenset[tuple[int, int]]]] = [(b"", frozenset())]
    while waiting:
        below, parents = waiting.pop()
        folder = os.path.join(root, below)
        try:
            status = os.stat(folder)
            if (status.st_dev, status.st_ino) in parents:
                continue
            entries = list(os.scandir(folder))
        except OSError as error:
            raise UserError(f"{text(folder)} cannot be listed ({error.strerror}): check its permissions.") from error
        for entry in entries:
            if entry.name.startswith(b"."):
                continue
            path = below + b"/" + entry.name if below else entry.name
            if entry.is_dir():
                waiting.append((path, parents | {(status.st_dev, status.st_ino)}))
            elif entry.name.lower().endswith(SUFFIXES) and entry.is_file():
                yield path


def _split(root: Path, paths: list[bytes]) -> tuple[Split, Split | None]:
    """Train and test among all `paths`, if their folders say so."""

    def below(folder: bytes) -> list[bytes]:
        return [path[len(folder) + 1 :] for path in paths if path.startswith(folder + b"/")]

    train = below(b"train")
    test = next((Split(name, found) for name in (b"val", b"test") if (found := below(name))), None)
    if not train and test is not None and (root / "train").is_dir():
        raise UserError(f"{root / 'train'} holds no image file, {text(test.folder)} beside it does: check data.root.")
    if train and (test is not None or len(train) == len(paths)):
        return Split(b"train", train), test
    return Split(b"", paths), None
