"""A subset of a source, indices spread evenly over a source, and those held out by class."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import final

import numpy as np
import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from dino_lite.contracts import Source
from dino_lite.data.sources import digest


@final
class Subset(Source):
    """Some images of a source, as a source."""

    def __init__(self, source: Source, rows: Int[np.ndarray, "n"]) -> None:
        self.source, self.rows = source, rows
        self.labels = None if source.labels is None else source.labels[rows]
        self.classes = source.classes
        self.channels, self.pixels = source.channels, source.pixels
        self.groups = None
        if source.groups is not None:  # runs of images that lie in one group
            group = np.searchsorted(source.groups, rows, "right")
            starts = np.flatnonzero(np.diff(group, prepend=-1))
            self.groups = np.append(starts, len(rows)).astype(np.int64)

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, index: int, min_pixels: int | None = None) -> UInt8[np.ndarray, "H W C"]:
        """Image `index` of the part."""
        return self.source.read(int(self.rows[index]), min_pixels)

    def prefetch(self, indices: Sequence[int]) -> None:
        """Announce the images to the whole source."""
        self.source.prefetch(self.rows[list(indices)].tolist())

    def image_size(self, index: int) -> tuple[int, int]:
        """Height and width of image `index` of the part."""
        return self.source.image_size(int(self.rows[index]))

    def encoded(self, index: int) -> tuple[bytes, str] | None:
        """The file of image `index` of the part."""
        return self.source.encoded(int(self.rows[index]))

    def data_files(self) -> Iterable[str | bytes]:
        """The whole source's."""
        return self.source.data_files()

    def name(self, index: int) -> str:
        """The whole source's name of it."""
        return self.source.name(int(self.rows[index]))

    def digest(self) -> str:
        """16 hex digits over the whole source's digest and the rows."""
        return digest([self.source.digest().encode(), self.rows.tobytes()])


def spread(num_images: int, most: int) -> Int[np.ndarray, "n"]:
    """At most `most` indices, deterministic: one from each of `most` equal stretches.

    The position within a stretch is random: if classes alternate, a regular stride may hit only
    one.
    """
    if num_images <= most:
        return np.arange(num_images)
    borders = np.arange(most + 1) * num_images // most
    return np.random.default_rng(0).integers(borders[:-1], borders[1:])


def hold_out(
    labels: Int[Tensor, "N"], share: float, seed: int
) -> tuple[Int[Tensor, "K"], Int[Tensor, "H"]]:
    """Indices that are kept and that are held out, both sorted.

    Stratified: of each class the number nearest to `share` is held out, drawn from `seed`; at least
    one image but never the last one.
    """
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    _, numbers, counts = torch.unique(labels, return_inverse=True, return_counts=True)
    most = (counts - 1).clamp(min=0)
    quota = (share * counts.double()).round().long().clamp(min=1).minimum(most)
    by_class = order[numbers[order].argsort(stable=True)]  # shuffled within each class
    place = torch.arange(len(labels)) - (counts.cumsum(0) - counts).repeat_interleave(counts)
    held = torch.zeros(len(labels), dtype=torch.bool)
    held[by_class] = place < quota.repeat_interleave(counts)
    return (~held).nonzero()[:, 0], held.nonzero()[:, 0]
