"""The order of images in a run. The only state is the step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import count

import numpy as np
from jaxtyping import Int64

from dino_lite.contracts import UserError
from dino_lite.data import order

PART_SIZE = 64  # images per item of work: a batch of 1024 would be 535 MB


class PositionSampler:
    """The (epoch, index) pairs of one rank, step by step from `start_step`, in parts of ≤ 64.

    Sample position p = step·batch_size + i of the joint batch is image order_e[p mod n] of epoch e
    = p

    n, so batches straddle epochs and no image is dropped. Rank r has the r-th contiguous slice: the
    ranks' slices concatenated are the batch of a single process. Ends at step `num_steps`; None:
    endless. `groups` are the source's, see `order.grouped_permutation`, and so are `turns`.
    """

    def __init__(
        self,
        n: int,
        batch_size: int,
        rank: int = 0,
        num_ranks: int = 1,
        seed: int = 0,
        start_step: int = 0,
        num_steps: int | None = None,
        groups: Int64[np.ndarray, "bounds"] | None = None,
        turns: Callable[[np.ndarray, int], np.ndarray] | None = None,
    ) -> None:
        if n < 1:
            raise UserError("There is no image to train on; check data.root.")
        if batch_size < 1 or batch_size % num_ranks:
            raise UserError(
                f"loader.batch_size={batch_size} is the images of a step over all {num_ranks} "
                "devices and must be a positive multiple of their number."
            )
        self.n, self.batch_size, self.seed = n, batch_size, seed
        self.rank, self.num_ranks = rank, num_ranks
        self.start_step, self.num_steps = start_step, num_steps
        self.groups, self.turns = groups, turns
        self._order_of: tuple[int, np.ndarray] | None = None  # cached for the latest epoch

    @property
    def images_per_step(self) -> int:
        """Images of this rank per step."""
        return self.batch_size // self.num_ranks

    @property
    def parts_per_step(self) -> int:
        """Parts of this rank per step; the last may be smaller."""
        return -(-self.images_per_step // PART_SIZE)

    def steps(self) -> Iterator[int]:
        """The remaining steps."""
        if self.num_steps is None:
            return count(self.start_step)
        return iter(range(self.start_step, self.num_steps))

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for step in self.steps():
            first = step * self.batch_size + self.rank * self.images_per_step
            last = first + self.images_per_step
            for start in range(first, last, PART_SIZE):
                yield [self.at(p) for p in range(start, min(start + PART_SIZE, last))]

    def at(self, position: int) -> tuple[int, int]:
        """Epoch and image at an absolute sample position."""
        epoch, place = divmod(position, self.n)
        if self._order_of is None or self._order_of[0] != epoch:
            self._order_of = epoch, self._order(epoch)
        return epoch, int(self._order_of[1][place])

    def _order(self, epoch: int) -> Int64[np.ndarray, "n"]:
        if self.groups is None:
            places = order.permutation(self.seed, epoch, self.n)
        else:
            places = order.grouped_permutation(self.seed, epoch, self.groups)
        return places if self.turns is None else self.turns(places, epoch)
