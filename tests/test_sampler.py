"""Order of images: a function of the step, whatever the ranks and wherever the run started."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain, islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset

from dino_lite.contracts import UserError
from dino_lite.data import order
from dino_lite.data.sampler import PART_SIZE, PositionSampler

Pairs = list[tuple[int, int]]


def steps(sampler: PositionSampler) -> list[Pairs]:
    """The pairs of each step, its parts joined."""
    parts = list(sampler)
    k = sampler.parts_per_step
    return [joined(parts[i : i + k]) for i in range(0, len(parts), k)]


def joined(parts: Iterable[Pairs]) -> Pairs:
    """The pairs of all parts."""
    return list(chain.from_iterable(parts))


@settings(max_examples=25)
@given(n=st.integers(1, 40), batch_size=st.integers(1, 50), seed=st.integers(0, 9))
def test_every_epoch_shows_every_image_once(n: int, batch_size: int, seed: int) -> None:
    """No image is dropped or doubled, also where a batch straddles epochs or is larger than one."""
    num_steps = -(-3 * n // batch_size)
    pairs = joined(PositionSampler(n, batch_size, seed=seed, num_steps=num_steps))
    assert len(pairs) == num_steps * batch_size
    for epoch in range(3):
        assert [e for e, _ in pairs[epoch * n : epoch * n + n]] == n * [epoch]
        assert sorted(i for _, i in pairs[epoch * n : epoch * n + n]) == list(range(n))


@settings(max_examples=25)
@given(n=st.integers(1, 300), images=st.integers(1, 90), num_ranks=st.sampled_from([2, 3, 4]))
def test_ranks_joined_are_one_process(n: int, images: int, num_ranks: int) -> None:
    """The ranks' slices, one after the other, are the batch of a single process, step by step."""
    batch_size = images * num_ranks
    alone = steps(PositionSampler(n, batch_size, num_steps=4))
    ranks = [
        steps(PositionSampler(n, batch_size, rank, num_ranks, num_steps=4))
        for rank in range(num_ranks)
    ]
    assert [joined(slices) for slices in zip(*ranks, strict=True)] == alone


@settings(max_examples=25)
@given(n=st.integers(1, 100), batch_size=st.integers(1, 150), start=st.integers(0, 7))
def test_a_start_at_any_step_goes_on_as_if_uninterrupted(
    n: int, batch_size: int, start: int
) -> None:
    """Also in the middle of an epoch; at the last step nothing is left."""
    whole = steps(PositionSampler(n, batch_size, seed=3, num_steps=7))
    rest = steps(PositionSampler(n, batch_size, seed=3, start_step=start, num_steps=7))
    assert rest == whole[start:]


def test_parts_are_small_and_whole() -> None:
    """At most 64 images a part, as many parts each step as announced."""
    sampler = PositionSampler(1000, 300, rank=1, num_ranks=2, num_steps=2)
    sizes = [len(part) for part in sampler]
    assert sizes == 2 * [64, 64, 22]
    assert max(sizes) == PART_SIZE
    assert sampler.parts_per_step == 3


def test_without_an_end_there_is_none() -> None:
    """Runs that end by the clock never run out of images, and agree with those that count."""
    endless = islice(iter(PositionSampler(10, 4)), 100)
    assert list(endless) == list(PositionSampler(10, 4, num_steps=100))


def test_order_differs_between_epochs_and_seeds() -> None:
    """A fixed order would show the same neighbors together every epoch."""
    first, second = steps(PositionSampler(50, 50, num_steps=2))
    other = steps(PositionSampler(50, 50, seed=1, num_steps=1))[0]
    orders = [[i for _, i in pairs] for pairs in (first, second, other)]
    assert len(np.unique(orders, axis=0)) == 3


@settings(max_examples=40)
@given(
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(any), seed=st.integers(0, 9)
)
def test_grouped_order_shows_every_image_once(sizes: list[int], seed: int) -> None:
    """Each epoch is a permutation, whatever the groups; also empty ones."""
    groups = np.cumsum([0, *sizes])
    n = int(groups[-1])
    pairs = joined(PositionSampler(n, 2 * n, seed=seed, num_steps=1, groups=groups))
    assert [sorted(i for _, i in pairs[start : start + n]) for start in (0, n)] == 2 * [
        list(range(n))
    ]


def test_grouped_order_keeps_few_groups_open(monkeypatch: pytest.MonkeyPatch) -> None:
    """Images of a window come from its groups alone; windows and epochs differ in theirs."""
    monkeypatch.setattr(order, "WINDOW", 100)
    groups = np.arange(0, 1001, 20)
    assert order.groups_per_window(groups) == 5
    orders = [order.grouped_permutation(3, epoch, groups) for epoch in (0, 1)]
    windows = [
        [frozenset((part // 20).tolist()) for part in order.reshape(10, 100)] for order in orders
    ]
    assert all(len(window) == 5 for window in windows[0])
    assert len(frozenset().union(*windows[0])) == 50
    assert set(windows[0]) != set(windows[1])
    inside = orders[0][:100]
    assert len({int(i) // 20 for i in inside[:20]}) > 2  # mixed within the window
    assert inside.tolist() != sorted(inside.tolist())


def test_large_groups_are_still_mixed() -> None:
    """A window has at least four groups, and all of a small source."""
    assert order.groups_per_window(np.array([0, 10**6, 2 * 10**6])) == 4
    assert order.groups_per_window(np.array([0, 1, 3])) >= 2


class Echo(Dataset[list[tuple[int, int]]]):
    """Gives back what is asked for."""

    def __getitems__(self, pairs: list[tuple[int, int]]) -> list[tuple[int, int]]:
        return pairs


def as_it_is(pairs: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """No stacking."""
    return pairs


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")  # few cores
@pytest.mark.parametrize("num_workers", [0, 1, 3])
@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_groups_are_split_over_ranks_and_workers_without_loss(
    num_ranks: int, num_workers: int
) -> None:
    """Ranks and workers together show each image once an epoch, in the order of one process; a
    run that is resumed in the middle of an epoch goes on with the same batches.
    """
    groups = np.cumsum([0, 7, 30, 1, 22, 12, 48])
    n, batch_size = 120, 12

    def found(start: int, ranks: int, workers: int) -> list[Pairs]:
        by_rank = []
        for rank in range(ranks):
            sampler = PositionSampler(n, batch_size, rank, ranks, 5, start, 20, groups)
            loader = DataLoader(
                Echo(), batch_sampler=sampler, num_workers=workers, collate_fn=as_it_is
            )
            by_rank.append(list(loader))
        return [joined(parts) for parts in zip(*by_rank, strict=True)]

    alone = found(0, 1, 0)
    assert found(0, num_ranks, num_workers) == alone
    assert found(7, num_ranks, num_workers) == alone[7:]
    for epoch in range(2):
        shown = joined(alone[epoch * 10 : epoch * 10 + 10])
        assert sorted(i for _, i in shown) == list(range(n))


@pytest.mark.parametrize(
    ("n", "batch_size", "num_ranks", "key"),
    [(10, 7, 2, "loader.batch_size"), (10, 0, 1, "loader.batch_size"), (0, 4, 1, "data.root")],
)
def test_impossible_batches_are_refused(n: int, batch_size: int, num_ranks: int, key: str) -> None:
    """One sentence that names the key."""
    with pytest.raises(UserError, match=key):
        PositionSampler(n, batch_size, num_ranks=num_ranks)
