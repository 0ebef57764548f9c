"""Common parts of sources: paths, digests, images by path or in memory."""

from __future__ import annotations

import io
import os
import posixpath
from collections.abc import Iterable, Iterator, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any, final

import numpy as np
from jaxtyping import Int, UInt8
from torch import Tensor

from dino_lite.contracts import Source, UserError
from dino_lite.data.decode import File, decode, upright_size
from dino_lite.data.paths import Paths
from dino_lite.data.pixels import Pixels, as_pixels
from dino_lite.data.remote import Remote
from dino_lite.data.shared import share


def expand(root: object) -> Path:
    """`data.root`, absolute, with `~` and environment variables replaced; it need not exist."""
    text = "" if root is None else str(root)
    if not text:
        raise UserError("data.root is not set: name the folder or file that holds the images.")
    return Path(os.path.abspath(os.path.expanduser(os.path.expandvars(text))))


def text(path: bytes) -> str:
    """A path for display; bytes that are not UTF-8 are written \\xNN."""
    return path.decode("utf-8", "backslashreplace")


def digest(chunks: Iterable[bytes]) -> str:
    """16 hex digits over `chunks`, in order and including their bounds."""
    total = blake2b(digest_size=8)
    for chunk in chunks:
        total.update(len(chunk).to_bytes(8, "little") + chunk)
    return total.hexdigest()


def reason(error: Exception) -> str:
    """Why an image cannot be read, for a sentence that names its path itself."""
    told = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return told.rstrip(". ")


@final
class PathSource(Source):
    """Image files by path or URL.

    Relative paths are relative to `folder`. Paths and labels are shared with workers; there is no
    object per image.
    """

    def __init__(
        self,
        folder: bytes,
        paths: Paths,
        labels: Int[np.ndarray, "N"] | None,
        classes: list[str],
        pixels: Pixels | int = 3,
        opener: Remote | None = None,
    ) -> None:
        self.folder, self.paths, self.opener = folder, paths, opener or Remote()
        self.labels = None if labels is None else share(labels)
        self.classes = classes
        self.pixels = as_pixels(pixels)
        self.channels = self.pixels.channels
        self._fetched: dict[int, bytes | OSError] = {}  # by `prefetch`
        self._digest: str | None = None

    def __len__(self) -> int:
        return len(self.paths)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_fetched": {}}

    def path(self, index: int) -> bytes:
        """Full path or URL of image `index`; bytes, since it need not be UTF-8."""
        path = self.paths[index]
        return path if b"://" in path else posixpath.join(self.folder, path)

    def read(self, index: int, min_pixels: int | None = None) -> UInt8[np.ndarray, "H W C"]:
        """Image `index`, as `decode` gives it."""
        with self._open(index) as file:
            return decode(file, self.pixels, min_pixels)

    def prefetch(self, indices: Sequence[int]) -> None:
        """Fetch those behind URLs concurrently for `read`, and drop those fetched before."""
        urls = {i: path for i in indices if b"://" in (path := self.path(i))}
        if urls:
            fetched = self.opener.fetch_all([*urls.values()])
            self._fetched = dict(zip(urls, fetched, strict=True))

    def encoded(self, index: int) -> tuple[bytes, str]:
        """Content and suffix of the file. Raises OSError."""
        path = self.path(index)
        with self._open(index) as file:
            name = path.partition(b"?")[0] if b"://" in path else path
            return file.read(), text(posixpath.splitext(name)[1])

    def image_size(self, index: int) -> tuple[int, int]:
        """Height and width of image `index`, from its header. Raises as `read` does."""
        with self._open(index) as file:
            return upright_size(file)

    def data_files(self) -> Iterator[bytes]:
        """The paths or URLs of all images."""
        return (self.path(index) for index in range(len(self)))

    def name(self, index: int) -> str:
        """The full path of image `index`."""
        return text(self.path(index))

    def digest(self) -> str:
        """16 hex digits over the stored paths, independent of `folder`."""
        if self._digest is None:  # takes seconds for millions of paths
            self._digest = digest(self.paths)
        return self._digest

    def _open(self, index: int) -> File:
        found = self._fetched.get(index)
        if isinstance(found, OSError):
            raise found
        return self.opener(self.path(index)) if found is None else io.BytesIO(found)


@final
class ArraySource(Source):
    """Images in memory, all of one size.

    `images` is a tensor because torch shares tensors with workers, but copies arrays.
    """

    def __init__(
        self,
        images: UInt8[Tensor, "N H W C"],
        labels: Int[np.ndarray, "N"] | None,
        classes: Sequence[str],
        title: str,
    ) -> None:
        self.images = images
        self.labels = labels
        self.classes = classes
        self.title = title

    def __len__(self) -> int:
        return len(self.images)

    def read(self, index: int, min_pixels: int | None = None) -> UInt8[np.ndarray, "H W C"]:
        """Image `index` at full size: a view, not to be written to."""
        pixels: np.ndarray = self.images[index].numpy()
        return pixels

    def image_size(self, index: int) -> tuple[int, int]:
        """Height and width of image `index`."""
        return self.images.shape[1], self.images.shape[2]

    def name(self, index: int) -> str:
        """The set's title and the index: `shapes/train[17]`."""
        return f"{self.title}[{index}]"

    def digest(self) -> str:
        """16 hex digits over shape and pixels."""
        pixels = self.images.contiguous().numpy()
        return digest([str(pixels.shape).encode(), pixels.tobytes()])
