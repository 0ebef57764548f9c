"""The nearest of many, against sorting them all."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dino_lite.eval import neighbors
from dino_lite.eval.neighbors import Bank, nearest, unit


def in_quarters(num: int, dim: int, seed: int) -> Tensor:
    """Rows whose cosines are exact and often equal: of four entries ±1/2, the others 0."""
    generator = torch.Generator().manual_seed(seed)
    places = torch.rand(num, dim, generator=generator).argsort(dim=1)[:, :4]
    signs = torch.randint(2, (num, 4), generator=generator) - 0.5
    return torch.zeros(num, dim).scatter(1, places, signs)


def sorted_all(similarity: Tensor, k: int, exclude: list[int] | None) -> list[list[int]]:
    """Every column by similarity, then by number; the first k."""
    chosen = []
    for i, row in enumerate(similarity.tolist()):
        others = [j for j in range(len(row)) if exclude is None or j != exclude[i]]
        chosen.append(sorted(others, key=lambda j: (-row[j], j))[:k])
    return chosen


@given(
    num_queries=st.integers(1, 9),
    num_bank=st.integers(2, 150),
    dim=st.integers(4, 9),
    k=st.integers(1, 20),
    cells=st.integers(1, 700),
    num_rows=st.integers(1, 10),
    leave_one_out=st.booleans(),
    in_blocks=st.booleans(),
    seed=st.integers(0, 100),
)
def test_nearest_equals_sorting_everything(
    num_queries: int,
    num_bank: int,
    dim: int,
    k: int,
    cells: int,
    num_rows: int,
    leave_one_out: bool,
    in_blocks: bool,
    seed: int,
) -> None:
    """Few or many tiles and groups, k beyond a tile, equals within and across tiles, banks in the
    order of their classes: the same rows, equals by index.
    """
    bank = in_quarters(num_bank, dim, seed)
    bank = bank.repeat_interleave(3, dim=0)[:num_bank] if in_blocks else bank
    queries = in_quarters(num_queries, dim, seed + 1)
    exclude = torch.randint(num_bank, (num_queries,)) if leave_one_out else None
    k = min(k, num_bank - leave_one_out)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(neighbors, "_CELLS", cells)
        patch.setattr(neighbors, "_ROWS", num_rows)
        similarity, index = nearest(queries, bank, k, exclude)
    exact = queries @ bank.T
    assert index.tolist() == sorted_all(exact, k, None if exclude is None else exclude.tolist())
    assert torch.equal(similarity, exact.gather(1, index))


@pytest.mark.slow
def test_thousands_of_rows_without_equals_are_sorted_too() -> None:
    """Over several tiles and hundreds of groups, the best first, last and spread."""
    generator = torch.Generator().manual_seed(0)
    bank = torch.randn(9000, 8, generator=generator)
    rising = bank[(bank @ bank[0]).argsort()]
    for some in (bank, rising, rising.flip(0)):
        similarity, index = nearest(bank[:1000], some, 30)
        expected, places = (unit(bank[:1000]) @ unit(some).T).sort(dim=1, descending=True)
        torch.testing.assert_close(similarity, expected[:, :30])
        assert (index == places[:, :30]).double().mean() > 0.999  # rounding may swap a pair


def test_equals_come_in_the_order_of_the_bank() -> None:
    """Where the border of the k nearest cuts through equals, those with lower index are kept."""
    bank = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 0.0]])
    similarity, index = nearest(torch.tensor([[1.0, 0.0]]), bank, 2)
    assert index.tolist() == [[1, 3]]
    assert similarity.tolist() == [[1.0, 1.0]]


def test_length_does_not_matter() -> None:
    """Rows are compared by direction; a row of zeros is like nothing, and like all alike."""
    bank = torch.tensor([[0.0, 0.0], [0.1, 0.0], [30.0, 40.0]])
    similarity, index = nearest(torch.tensor([[5.0, 0.0], [0.0, 0.0]]), bank, 3)
    assert index.tolist() == [[1, 2, 0], [0, 1, 2]]
    torch.testing.assert_close(similarity, torch.tensor([[1.0, 0.6, 0.0], [0.0, 0.0, 0.0]]))


def test_similarities_cover_the_bank_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each row is in one part, and neighbors in the bank are in different ones."""
    queries, bank = torch.randn(3, 5), torch.randn(10, 5)
    monkeypatch.setattr(neighbors, "_CELLS", 12)
    whole, parts = torch.full((3, 10), torch.nan), []
    for rows, tile in Bank(bank, 3).similarities(queries):
        whole[:, rows] = tile
        parts.append(torch.arange(10)[rows].tolist())
    assert parts == [[0, 3, 6, 9], [1, 4, 7], [2, 5, 8]]
    torch.testing.assert_close(whole, unit(queries) @ unit(bank).T)


def test_full_precision_whatever_training_chose(monkeypatch: pytest.MonkeyPatch) -> None:
    """Similarities ignore a choice of faster products, and leave it as it was."""
    seen, product = [], torch.mm

    def noted(*args: Tensor, out: Tensor) -> Tensor:
        seen.append(torch.get_float32_matmul_precision())
        return product(*args, out=out)

    monkeypatch.setattr(torch, "mm", noted)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        nearest(torch.randn(3, 4), torch.randn(5, 4), 2)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert seen == ["highest"]
