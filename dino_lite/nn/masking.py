"""Which patches the student does not see, and where they are in a batch.

Masks are drawn on the host for the crops of all ranks and keyed by (seed, step): every rank draws
the same and takes its own, and so does a resumed run. No loop goes over crops.
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

NUM_TRIES = 10  # rectangles tried before a crop gets no more blocks


class BlockMasking:
    """Masks of rectangles for a part of a batch's crops: DINOv2's (Oquab et al. 2023, section 4, as
    in iBOT), the rectangles being those of BEiT (Bao et al. 2021, Algorithm 1).

    `sample_prob` of the crops are masked, whichever; `ratio` is the part of their patches: it is
    cut into equal slices, one for each masked crop, so that a batch has few and many alike. With
    `exact` single patches complete what rectangles leave open; DINOv2 falls short there, by one
    patch in fifteen crops. Rectangles are tried with `min_patches` or more, up to half the rows'
    worth, their sides at a ratio from `min_aspect` to 1/`min_aspect`; what overlaps counts once.
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
        """Masks of all crops of a step; none is masked where `sample_prob` leaves less than one."""
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
        """Mask rectangle after rectangle while some are `left` and a try succeeds."""
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
        """Mask as many single patches as are `left`, any alike."""
        short, patches = left.nonzero()[0], np.arange(masked.shape[1] * masked.shape[2])
        cells = masked[short].reshape(len(short), len(patches))
        keys = draws.hashed(self.seed, draws.SINGLES, step, crops[short, None], patches)
        keys[cells] = draws.MASK  # these come last
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
    """The first of the tried rectangles that adds a patch and no more than are `left`; none: empty.

    It is smaller than the grid both ways, and has at most the patches of half the rows: that is
    what `0.5 * image // patch * image // patch` comes to in the reference.
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
    """1 in `length` cells of a row of `size`, anywhere in it; else 0."""
    start = (u * (size - length + 1)).astype(int)[..., None]
    cells = np.arange(size, dtype=int)
    inside: np.ndarray = (cells >= start) & (cells < start + length[..., None])
    return inside.astype(np.float32)
