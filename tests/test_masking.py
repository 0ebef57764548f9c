"""Masked patches: how many, which, the same for every rank, and where they are in a batch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dino_lite.contracts import UserError
from dino_lite.nn.masking import BlockMasking, choose_block


def block_by_block(rng: np.random.Generator, grid: tuple[int, int], target: int) -> np.ndarray:
    """The oracle: BEiT's Algorithm 1 for one crop, patch by patch."""
    (rows, columns), mask = grid, np.zeros(grid, bool)
    while (left := target - mask.sum()) > 0:
        budget = min(left, rows // 2 * columns)
        for _ in range(10):
            area = 4 + (budget - 4) * rng.random()
            aspect = np.exp(rng.uniform(np.log(0.3), -np.log(0.3)))
            height, width = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
            if height >= rows or width >= columns:
                continue
            top, start = rng.integers(rows - height + 1), rng.integers(columns - width + 1)
            more = mask.copy()
            more[top : top + height, start : start + width] = True
            if 0 < more.sum() - mask.sum() <= budget:
                mask = more
                break
        else:
            return mask
    return mask


def edges(masks: np.ndarray) -> np.ndarray:
    """Neighbors of which one is masked, in each mask: few, where masks are of blocks."""
    down, across = masks[:, 1:] ^ masks[:, :-1], masks[:, :, 1:] ^ masks[:, :, :-1]
    return np.asarray(down.sum((1, 2)) + across.sum((1, 2)))


# ---------------------------------------------------------------------------------------- how many


@given(
    num_crops=st.integers(0, 40),
    grid=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    ratio=st.tuples(st.floats(0, 1), st.floats(0, 1)).map(lambda pair: tuple(sorted(pair))),
    sample_prob=st.floats(0, 1),
    seed=st.integers(0, 9),
)
def test_counts_are_exact(
    num_crops: int, grid: tuple[int, int], ratio: Any, sample_prob: float, seed: int
) -> None:
    """As many crops as asked for, the i-th largest mask from the i-th slice of the ratios, for
    grids of any size and shape.
    """
    masking = BlockMasking(ratio, sample_prob, seed=seed)
    masks = masking.draw(num_crops, grid, step=3)
    assert masks.shape == (num_crops, *grid)
    num, size = int(num_crops * sample_prob), grid[0] * grid[1]
    counts = np.sort(masks.sum((1, 2)))
    assert not counts[: num_crops - num].any()
    slices = np.linspace(*ratio, num + 1)
    assert (counts[num_crops - num :] >= np.floor(size * slices[:-1] - 1e-9)).all()
    assert (counts[num_crops - num :] <= np.floor(size * slices[1:] + 1e-9)).all()


@pytest.mark.parametrize("grid", [(14, 14), (5, 12), (2, 2), (1, 6)])
def test_rough_counts_fall_short_only(grid: tuple[int, int]) -> None:
    """Without the single patches a mask is a part of the exact one, and some masks lack a few."""
    rough, exact = (
        BlockMasking(sample_prob=1.0, exact=exact).draw(600, grid, 0) for exact in (False, True)
    )
    assert not (rough & ~exact).any()
    short = exact.sum((1, 2)) - rough.sum((1, 2))
    assert short.max() > 0
    assert min(grid) < 3 or short.mean() < 0.2


def test_a_batch_of_one_may_go_without_masks() -> None:
    """Less than one crop to mask: none is."""
    assert not BlockMasking(sample_prob=0.4).draw(2, (4, 4), 0).any()


def test_all_patches_may_be_masked() -> None:
    """A ratio of 1 leaves nothing, though no block is as large as the grid."""
    assert BlockMasking((1.0, 1.0), 1.0).draw(5, (3, 4), 0).all()


# ------------------------------------------------------------------------------------------- which


def test_masks_are_those_of_the_algorithm() -> None:
    """On a grid that is not square, against plain loops: the same share of each patch, the same
    number of edges, the same shortfall, within 5 standard errors.
    """
    grid, target, num = (6, 10), 25, 800
    ours = BlockMasking((25.5 / 60, 25.5 / 60), 1.0, exact=False).draw(num, grid, 0)
    rng = np.random.default_rng(0)
    theirs = np.stack([block_by_block(rng, grid, target) for _ in range(num)])
    pairs = [(ours, theirs), (edges(ours), edges(theirs)), (ours.sum((1, 2)), theirs.sum((1, 2)))]
    for a, b in pairs:
        error = np.sqrt((a.var(0) + b.var(0)) / num)
        assert (np.abs(a.mean(0) - b.mean(0)) <= 5 * error).all()
    single = np.random.default_rng(0).permuted(ours.reshape(num, -1), axis=1).reshape(ours.shape)
    assert edges(ours).mean() < 0.75 * edges(single).mean()


@pytest.mark.slow
def test_any_crop_may_be_masked_and_any_much() -> None:
    """Over 1000 steps each of 8 crops is masked in half of them, and as much as the others."""
    masking = BlockMasking()
    counts = np.stack([masking.draw(8, (6, 6), step).sum((1, 2)) for step in range(1000)])
    often = (counts > 0).mean(0)
    assert np.abs(often - 0.5).max() < 5 * np.sqrt(0.25 / 1000)
    much = np.array([column[column > 0].mean() for column in counts.T])
    assert np.abs(much - much.mean()).max() < 5 * counts[counts > 0].std() / np.sqrt(500)


def test_single_patches_lie_anywhere() -> None:
    """Where no block fits (one row), each patch is masked equally often."""
    masks = BlockMasking((0.5, 0.5), 1.0).draw(2000, (1, 8), 0)
    assert (masks.sum((1, 2)) == 4).all()
    assert np.abs(masks.mean((0, 1)) - 0.5).max() < 5 * np.sqrt(0.25 / 2000)


def test_masks_depend_on_nothing_but_seed_and_step() -> None:
    """Two ranks that draw for themselves hold the same batch, of which each takes its images; a
    step drawn again is the same, another step or seed is not.
    """
    one, other = BlockMasking(seed=4), BlockMasking(seed=4)
    other.draw(6, (3, 3), 0)  # what was drawn before leaves no trace
    num_images, grid = 10, (7, 7)
    whole, again = (masking.draw(2 * num_images, grid, 5) for masking in (one, other))
    crops = [masks.reshape(2, num_images, *grid) for masks in (whole, again)]
    halves = crops[0][:, :5], crops[1][:, 5:]
    assert np.array_equal(np.concatenate(halves, 1).reshape(whole.shape), whole)
    assert (one.draw(20, grid, 6) != whole).any()
    assert (BlockMasking(seed=5).draw(20, grid, 5) != whole).any()


@given(seed=st.integers(0, 99), share=st.floats(0, 0.6), left=st.integers(1, 40))
def test_a_block_is_a_rectangle_that_keeps_to_its_bounds(
    seed: int, share: float, left: int
) -> None:
    """Smaller than the grid both ways, and adding at most what is left; or there is none."""
    rng = np.random.default_rng(seed)
    masked, u = rng.random((20, 5, 9)) < share, rng.random((20, 4, 10))
    chosen = choose_block(masked, np.full(20, left), u, 4, 0.3)
    height, width = chosen.any(2).sum(1), chosen.any(1).sum(1)
    assert np.array_equal(chosen.sum((1, 2)), height * width)
    assert (height < 5).all()
    assert (width < 9).all()
    num_new = (chosen & ~masked).sum((1, 2))
    assert (num_new <= min(left, 2 * 9)).all()
    assert ((num_new > 0) == (height > 0)).all()


# ------------------------------------------------------------------------------------------- where


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"ratio": (0.5, 0.1)}, "ratio"),
        ({"ratio": (0.1, 1.5)}, "ratio"),
        ({"ratio": (0.1,)}, "ratio"),
        ({"sample_prob": 1.1}, "sample_prob"),
        ({"min_patches": 0}, "min_patches"),
        ({"min_aspect": 0.0}, "min_aspect"),
    ],
)
def test_impossible_values_are_refused_by_name(values: dict[str, Any], key: str) -> None:
    """One sentence that names the key."""
    with pytest.raises(UserError, match=f"BlockMasking.{key}="):
        BlockMasking(**values)
