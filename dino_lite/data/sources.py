"""What the sources of images share: paths as users write them, digests, images in memory."""

from __future__ import annotations

import os
from collections.abc import Iterable
from hashlib import blake2b
from pathlib import Path

import numpy as np
from jaxtyping import Int, UInt8
from torch import Tensor

from dino_lite.contracts import UserError


def expand(root: object) -> Path:
    """`data.root`, absolute, with `~` and environment variables replaced; it need not exist."""
    text = "" if root is None else str(root)
    if not text:
        raise UserError("data.root is not set: name the folder or file that holds the images.")
    return Path(os.path.abspath(os.path.expanduser(os.path.expandvars(text))))


def digest(chunks: Iterable[bytes]) -> str:
    """16 hex digits over `chunks`, in order and with their bounds."""
    total = blake2b(digest_size=8)
    for chunk in chunks:
        total.update(len(chunk).to_bytes(8, "little"))
        total.update(chunk)
    return total.hexdigest()


class ArraySource:
    """Images in memory, all of one size.

    `images` is a tensor because torch shares tensors with its workers, and copies arrays.
    """

    def __init__(
        self,
        images: UInt8[Tensor, "N H W C"],
        labels: Int[np.ndarray, "N"] | None,
        classes: list[str],
        title: str,
    ) -> None:
        self.images = images
        self.labels = labels
        self.classes = classes
        self.title = title

    def __len__(self) -> int:
        return len(self.images)

    def read(self, index: int, min_pixels: int | None = None) -> UInt8[np.ndarray, "H W C"]:
        """Image `index`, whole: not a copy, so not to be written to."""
        pixels: np.ndarray = self.images[index].numpy()
        return pixels

    def size(self, index: int) -> tuple[int, int]:
        """Height and width of image `index`."""
        return self.images.shape[1], self.images.shape[2]

    def name(self, index: int) -> str:
        """The set's title and the index: `shapes/train[17]`."""
        return f"{self.title}[{index}]"

    def digest(self) -> str:
        """16 hex digits over shape and pixels."""
        pixels = self.images.contiguous().numpy()
        return digest([str(pixels.shape).encode(), pixels.tobytes()])
