"""Block masking for masked image modeling.

Masks are drawn on the host for the crops of all ranks, keyed by (seed, step): every rank draws the
same masks and uses its share, and a resumed run repeats them. Vectorized over crops.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count
from typing import Annotated

import numpy as np
from jaxtyping import Bool, Float, Float32, Int, Int64

from dino_lite import draws
from dino_lite.settings.kinds import Count, Fraction, Share, Size, rising
from dino_lite.settings.validate import checked

NUM_TRIES = 10  # candidate rectangles per block; if none fits, the crop gets no more blocks


class BlockMasking:
    """Block-wise masks for a fraction of a batch's crops, as in DINOv2 (Oquab et al. 2023, section
    4, after iBOT), with the rectangles of BEiT (Bao et al. 2021, Algorithm 1).

    A random fraction `sample_prob` of the crops is masked. The range `ratio` of masked fractions is
    divided into equal intervals, one for each masked crop, so that every batch covers the range.
    With `exact`, single patches make up for what rectangles miss (DINOv2 masks one patch fewer in
    one of fifteen crops). A rectangle has at least `min_patches` patches, at most those of half the
    rows, and an aspect ratio between `min_aspect` and 1/`min_aspect`; overlaps count once.
    """

    @checked
    def __init__(
        self,
        ratio: Annotated[Sequence[float], rising(0, 1)] = (0.1, 0.5),
        sample_prob: Fraction = 0.5,
        exact: bool = True,
        min_patches: Size = 4,
        min_aspect: Share = 0.3,
        seed: Count = 0,
    ) -> None:
        self.ratio, self.sample_prob, self.exact = ratio, sample_prob, exact
        self.min_patches, self.min_aspect, self.seed = min_patches, min_aspect, seed

    def draw(
        self, num_crops: int, grid: tuple[int, int], step: int
    ) -> Bool[np.ndarray, "num_crops rows columns"]:
        """Masks of all crops of a step; ⌊num_crops·sample_prob⌋ of them are not empty."""
        masks, num = np.zeros((num_crops, *grid), bool), int(num_crops * self.sample_prob)
        keys = draws.hashed(self.seed, draws.MASKS, step, np.arange(num_crops))
        crops = np.argsort(keys, kind="stable")[:num]
        place = np.arange(num) + draws.uniforms(self.seed, step, crops, 1, draws.RATIOS)[:, 0]
        ratio = self.ratio[0] + (self.ratio[1] - self.ratio[0]) * place / max(num, 1)
        left = (grid[0] * grid[1] * ratio).astype(np.int64)
        masked = masks[crops]
        self._add_blocks_(masked, left, crops, step)
        if self.exact:
            self._add_singles_(masked, left, crops, step)
        masks[crops] = masked
        return masks

    def _add_blocks_(
        self,
        masked: Bool[np.ndarray, "n rows columns"],
        left: Int64[np.ndarray, "n"],
        crops: Int64[np.ndarray, "n"],
        step: int,
    ) -> None:
        """Add rectangles to crops until no patches are `left` to mask or no candidate fits."""
        columns, still = np.arange(4 * NUM_TRIES), left.nonzero()[0]
        for block in count():
            if not len(still):
                return
            key = step, crops[still, None], block, columns
            u = draws.unit(draws.hashed(self.seed, draws.BLOCKS, *key)).reshape(-1, 4, NUM_TRIES)
            before = masked[still]
            after = before | choose_block(before, left[still], u, self.min_patches, self.min_aspect)
            num_new = (after ^ before).sum((1, 2))
            masked[still] = after
            left[still] -= num_new
            still = still[(num_new > 0) & (left[still] > 0)]

    def _add_singles_(
        self,
        masked: Bool[np.ndarray, "n rows columns"],
        left: Int64[np.ndarray, "n"],
        crops: Int64[np.ndarray, "n"],
        step: int,
    ) -> None:
        """Mask `left` further patches of each crop, chosen uniformly."""
        short, patches = left.nonzero()[0], np.arange(masked.shape[1] * masked.shape[2])
        cells = masked[short].reshape(len(short), len(patches))
        keys = draws.hashed(self.seed, draws.SINGLES, step, crops[short, None], patches)
        keys[cells] = draws.MASK  # the largest key: already masked patches sort last
        first = patches < left[short, None]
        order = np.argsort(keys, axis=1)
        np.put_along_axis(cells, order, np.take_along_axis(cells, order, 1) | first, 1)
        masked[short] = cells.reshape(len(short), *masked.shape[1:])


def choose_block(
    masked: Bool[np.ndarray, "n rows columns"],
    left: Int64[np.ndarray, "n"],
    u: Float[np.ndarray, "n 4 tries"],
    min_patches: int,
    min_aspect: float,
) -> Bool[np.ndarray, "n rows columns"]:
    """The first candidate rectangle that adds at least one patch and at most `left`; empty if there
    is none.

    It is smaller than the grid in both directions and has at most the patches of half the rows,
    which is the value of `0.5 * image // patch * image // patch` in the reference.
    """
    rows, columns = masked.shape[1:]
    budget = np.minimum(left, rows // 2 * columns)[:, None]  # n 1
    area = min_patches + (budget - min_patches) * u[:, 0]  # n tries
    aspect = min_aspect ** (1 - 2 * u[:, 1])
    height, width = (np.rint(np.sqrt(x)).astype(int) for x in (area * aspect, area / aspect))
    small = (height < rows) & (width < columns)
    height, width = height * small, width * small
    down = _span(u[:, 2], height, rows)
    across = _span(u[:, 3], width, columns)
    overlap = np.einsum("ntc,ntc->nt", down @ masked.astype(np.float32), across)
    num_new = height * width - overlap
    good = (num_new > 0) & (num_new <= budget)
    first = np.arange(len(masked)), good.argmax(1)
    down, across = down[first] * good[first][:, None], across[first]
    chosen: np.ndarray = (down[:, :, None] * across[:, None, :]).astype(bool)
    return chosen


def _span(
    u: Float[np.ndarray, "n tries"], length: Int[np.ndarray, "n tries"], size: int
) -> Float32[np.ndarray, "n tries size"]:
    """1 in `length` consecutive cells of `size`, at a position given by `u`; else 0."""
    start = (u * (size - length + 1)).astype(int)[..., None]
    cells = np.arange(size, dtype=int)
    inside: np.ndarray = (cells >= start) & (cells < start + length[..., None])
    return inside.astype(np.float32)
