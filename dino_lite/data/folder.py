"""A folder of images, whatever its nesting."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np
from jaxtyping import Int, UInt8

from dino_lite.contracts import Splits, UserError
from dino_lite.data.decode import decode, upright_size
from dino_lite.data.labels import Split, find_labels, text
from dino_lite.data.sources import digest, expand

# What Pillow reads by itself and people keep pictures in, and NumPy's arrays.
SUFFIXES = (
    *(b".avif", b".bmp", b".gif", b".jfif", b".jp2", b".jpe", b".jpeg", b".jpg", b".npy", b".pbm"),
    *(b".pgm", b".png", b".pnm", b".ppm", b".tga", b".tif", b".tiff", b".webp"),
)


def open_folder(
    root: str | Path | None = None, labels: str | None = "auto", channels: int = 3
) -> Splits:
    """The images below `root` in the byte order of their paths, without hidden files and folders.

    Splits: `root/train` beside `root/val` or `root/test`, or alone. Where both are, val is the
    test split (ImageNet's `test` has no labels). Without such folders every image is train.

    Classes: the first folder below the split, if that makes sense, or what `labels` says: auto,
    none, folder, or FILE.csv (path,label; paths relative to `root`). See `labels.find_labels`.
    `channels`: what every image is made to have, see `decode`.
    """
    top = expand(root)
    if not top.is_dir():
        what = "is not a folder" if top.exists() else "does not exist"
        raise UserError(f"data.root={top} {what}: name a folder of images.")
    paths = sorted(_image_paths(os.fsencode(top)))
    if not paths:
        raise UserError(
            f"{top} holds no image file (.jpg, .png …; hidden ones do not count): check data.root."
        )
    train, test = _split(top, paths)
    found = find_labels(top, labels, train, test)
    return Splits(
        FolderSource(top, train, found.train, found.classes, channels),
        None if test is None else FolderSource(top, test, found.test, found.classes, channels),
        top.name or "root",
    )


class FolderSource:
    """Image files of one split.

    Paths lie end to end in one buffer, so that a million of them reach a worker as two objects.
    """

    def __init__(
        self,
        root: Path,
        split: Split,
        labels: Int[np.ndarray, "N"] | None,
        classes: list[str],
        channels: int = 3,
    ) -> None:
        self.folder = os.path.join(os.fsencode(root), split.folder)
        self.labels = labels
        self.classes = classes
        self.channels = channels
        self._joined = b"".join(split.paths)
        self._bounds = np.cumsum([0, *map(len, split.paths)], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._bounds) - 1

    def path(self, index: int) -> bytes:
        """Path of image `index` below the split's folder; bytes, for it need not be UTF-8."""
        return self._joined[self._bounds[index] : self._bounds[index + 1]]

    def read(self, index: int, min_pixels: int | None = None) -> UInt8[np.ndarray, "H W C"]:
        """Image `index`, as `decode` gives it."""
        with self._open(index) as file:
            return decode(file, self.channels, min_pixels)

    def raw(self, index: int) -> tuple[bytes, str]:
        """The file of image `index` as it is, and its suffix with the dot."""
        with self._open(index) as file:
            return file.read(), os.path.splitext(text(self.path(index)))[1]

    def size(self, index: int) -> tuple[int, int]:
        """Height and width of image `index`, from its header. Raises as `read` does."""
        with self._open(index) as file:
            return upright_size(file)

    def name(self, index: int) -> str:
        """The whole path of image `index`."""
        return text(os.path.join(self.folder, self.path(index)))

    def digest(self) -> str:
        """16 hex digits over the paths below the split's folder, which itself may move."""
        return digest(self.path(index) for index in range(len(self)))

    def _open(self, index: int) -> IO[bytes]:
        return open(os.path.join(self.folder, self.path(index)), "rb")


def _image_paths(root: bytes) -> Iterator[bytes]:
    """Paths of the image files below `root`, relative to it and in no order.

    Linked folders are entered too, but none from within itself.
    """
    waiting: list[tuple[bytes, frozenset[tuple[int, int]]]] = [(b"", frozenset())]
    while waiting:
        below, around = waiting.pop()
        folder = os.path.join(root, below)
        try:
            status = os.stat(folder)
            with os.scandir(folder) as listing:
                entries = list(listing)
        except OSError as error:
            raise UserError(
                f"{text(folder)} cannot be listed ({error.strerror}): check its permissions."
            ) from error
        here = (status.st_dev, status.st_ino)
        if here in around:
            continue
        for entry in entries:
            if entry.name.startswith(b"."):
                continue
            path = below + b"/" + entry.name if below else entry.name
            if entry.is_dir():
                waiting.append((path, around | {here}))
            elif entry.name.lower().endswith(SUFFIXES) and entry.is_file():
                yield path


def _split(root: Path, paths: list[bytes]) -> tuple[Split, Split | None]:
    """Train and test among all `paths`, if their folders say so."""

    def below(folder: bytes) -> list[bytes]:
        return [path[len(folder) + 1 :] for path in paths if path.startswith(folder + b"/")]

    train = below(b"train")
    test = next((Split(name, found) for name in (b"val", b"test") if (found := below(name))), None)
    if not train and test is not None and (root / "train").is_dir():
        raise UserError(
            f"{root / 'train'} holds no image file, but {text(test.folder)} beside it does: "
            "check data.root."
        )
    if train and (test is not None or len(train) == len(paths)):
        return Split(b"train", train), test
    return Split(b"", paths), None
