"""Images of one collection, and in every epoch a few of others: replay."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import final

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from dino_lite.contracts import Source
from dino_lite.data.order import grouped_permutation, permutation
from dino_lite.data.shared import share
from dino_lite.data.sources import ArraySource, digest
from dino_lite.data.subset import Subset


@final
class Mixture(Source):
    """`own`, and `num_replayed` images of `others` (at least one of each), without their labels.

    An epoch shows each image of `own` once, and `num_replayed` others: as many of each collection,
    whatever their sizes, in an order drawn from `seed` that the next epoch continues, so that all
    get their turn. Images have numbers: first those of `own`, then those of each of `others` in
    that order, over and over up to the number that an epoch may show.
    """

    def __init__(
        self, own: Source, others: Sequence[Source], num_replayed: int, seed: int = 0
    ) -> None:
        self.own, self.others, self.num_replayed, self.seed = own, list(others), num_replayed, seed
        self.classes, self.channels, self.pixels = own.classes, own.channels, own.pixels
        unlabeled = np.full(num_replayed, -1, np.int64)
        self.labels = None if own.labels is None else np.concatenate([own.labels, unlabeled])
        self.groups = _with_replayed(own, num_replayed)
        self.orders = [share(_order(other, seed)) for other in others]
        most = -(-num_replayed // len(others))  # of a collection in an epoch
        self.sizes = np.array([len(other) * -(-most // len(other)) for other in others])
        self.starts = len(own) + np.cumsum(self.sizes) - self.sizes

    def __len__(self) -> int:
        return len(self.own) + self.num_replayed

    def turns(self, order: Int64[np.ndarray, "N"], epoch: int) -> Int64[np.ndarray, "N"]:
        """`order` with the next images of `others` in the places of those of the first epoch: they
        are read in their order, as groups are best read.
        """
        turn = epoch * self.num_replayed + np.arange(self.num_replayed)
        place, which = np.divmod(turn, len(self.others))
        found = order.copy()
        found[order >= len(self.own)] = self.starts[which] + place % self.sizes[which]
        return found

    def locate(self, index: int) -> tuple[int, Source, int]:
        """The collection of image `index` (0 is `own`), and its number there."""
        if index < len(self.own):
            return 0, self.own, index
        which = int(np.searchsorted(self.starts, index, "right")) - 1
        order = self.orders[which]
        return which + 1, self.others[which], int(order[(index - self.starts[which]) % len(order)])

    def read(self, index: int, min_pixels: int | None = None) -> UInt8[np.ndarray, "H W C"]:
        """Image `index`, as its collection reads it."""
        _, source, number = self.locate(index)
        return source.read(number, min_pixels)

    def prefetch(self, indices: Sequence[int]) -> None:
        """Announce to each collection its images."""
        found = [self.locate(index) for index in indices]
        for which, source in enumerate([self.own, *self.others]):
            if numbers := [number for other, _, number in found if other == which]:
                source.prefetch(numbers)

    def image_size(self, index: int) -> tuple[int, int]:
        """Height and width of image `index`."""
        _, source, number = self.locate(index)
        return source.image_size(number)

    def encoded(self, index: int) -> tuple[bytes, str] | None:
        """The file of image `index`, if its pixels follow from it as those of `own` do."""
        _, source, number = self.locate(index)
        alike = (source.channels, source.pixels) == (self.channels, self.pixels)
        return source.encoded(number) if alike else None

    def data_files(self) -> Iterable[str | bytes]:
        """Those of all collections."""
        return chain.from_iterable(source.data_files() for source in (self.own, *self.others))

    def name(self, index: int) -> str:
        """Its collection's name of image `index`."""
        _, source, number = self.locate(index)
        return source.name(number)

    def digest(self) -> str:
        """16 hex digits over the collections' digests, their sizes, and how they are mixed."""
        parts = [f"{len(source)} {source.digest()}" for source in (self.own, *self.others)]
        return digest([*map(str.encode, parts), f"{self.num_replayed} {self.seed}".encode()])


def _order(source: Source, seed: int) -> Int64[np.ndarray, "n"]:
    """All images of `source` in random order, those of a group near each other."""
    if source.groups is None:
        return permutation(seed, 0, len(source))
    return grouped_permutation(seed, 0, source.groups)


def _with_replayed(own: Source, num: int) -> Int64[np.ndarray, "bounds"] | None:
    """The groups of `own`, and groups of as many images for the `num` that are replayed, so that
    these are spread over the epoch.
    """
    if own.groups is None:
        return None
    size = max(1, len(own) // (len(own.groups) - 1))
    bounds = len(own) + np.append(np.arange(size, num, size), num)
    return np.concatenate([own.groups, bounds]).astype(np.int64)


def images_in_memory(source: Source, most: int) -> UInt8[Tensor, "N H W C"] | None:
    """All images of a source by their numbers, if they are in memory, of one size, and no side has
    more than `most` pixels.
    """
    if isinstance(source, ArraySource):
        return source.images if max(source.images.shape[1:3]) <= most else None
    if isinstance(source, Subset):
        whole = images_in_memory(source.source, most)
        return None if whole is None else whole[torch.from_numpy(source.rows)]
    if not isinstance(source, Mixture):
        return None
    parts = [images_in_memory(part, most) for part in (source.own, *source.others)]
    shape = None if parts[0] is None else parts[0].shape[1:]
    if any(part is None or part.shape[1:] != shape for part in parts):
        return None
    replayed = [
        part[torch.from_numpy(np.resize(order, size))]
        for part, order, size in zip(parts[1:], source.orders, source.sizes, strict=True)
        if part is not None
    ]
    return torch.cat([parts[0], *replayed])  # type: ignore[list-item]
