"""Exact nearest neighbors of features, in tiles that fit a processor's cache."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

_CELLS = 2**23  # similarities held at once: 32 MB for any sizes of bank and queries
_SHORTEST = 1e-12  # lower bound of lengths
_ALIGNED = 16  # row stride of similarities; unaligned products take a third longer
_ROWS = 256  # queries searched at once: little memory beside the similarities
_QUERIES = 1024  # queries for which similarities are held at once
_GROUP = 8  # columns whose maximum is compared first


def unit(features: Float[Tensor, "n D"]) -> Float[Tensor, "n D"]:
    """Rows of length 1; a row of zeros stays zero."""
    return F.normalize(features, dim=1, eps=_SHORTEST)


class Bank:
    """Features to search with at most `num_queries` queries at once, in parts.

    Parts are strided, so that each is a sample of a bank sorted by class. Buffers are allocated
    once, since repeated large allocations fragment memory.
    """

    def __init__(self, features: Float[Tensor, "N D"], num_queries: int) -> None:
        self.features = features
        wanted = math.ceil(len(features) * num_queries / _CELLS)
        self.num_parts = min(len(features), max(1, wanted))
        width = math.ceil(len(features) / max(1, self.num_parts))
        self._rows = features.new_empty(width, features.shape[1])
        self._tile = features.new_empty(num_queries, math.ceil(width / _ALIGNED) * _ALIGNED)

    def similarities(
        self, queries: Float[Tensor, "n D"]
    ) -> Iterator[tuple[slice, Float[Tensor, "n T"]]]:
        """Slices of the bank and the cosines of all queries with their rows; the next iteration
        overwrites them.
        """
        queries = unit(queries)
        for start in range(self.num_parts):
            part = slice(start, None, self.num_parts)
            rows = self.features[part]
            length = torch.linalg.vector_norm(rows, dim=1, keepdim=True).clamp_min_(_SHORTEST)
            rows = torch.div(rows, length, out=self._rows[: len(rows)])
            tile = self._tile[: len(queries), : len(rows)]
            with _full_precision():
                torch.mm(queries, rows.T, out=tile)
            yield part, tile

    def nearest(
        self, queries: Float[Tensor, "n D"], k: int, exclude: Int[Tensor, "n"] | None = None
    ) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"]]:
        """Cosine and index of the k rows most similar to each query, most similar first.

        Ties are ordered by index. `exclude`: one row per query to skip.
        """
        blocks = range(0, len(queries), _ROWS)
        best = [_Best(k) for _ in blocks]
        for part, tile in self.similarities(queries):
            if exclude is not None:
                here = (exclude % part.step == part.start).nonzero()[:, 0]
                tile[here, exclude[here] // part.step] = -torch.inf
            for start, of_block in zip(blocks, best, strict=True):
                of_block.look(tile[start : start + _ROWS], part)
        found = [of_block.in_order() for of_block in best]
        return torch.cat([values for values, _ in found]), torch.cat([index for _, index in found])


def nearest(
    queries: Float[Tensor, "n D"],
    bank: Float[Tensor, "N D"],
    k: int,
    exclude: Int[Tensor, "n"] | None = None,
) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"]]:
    """As `Bank.nearest`, of queries few enough for one block."""
    return Bank(bank, len(queries)).nearest(queries, k, exclude)


def indices_of_nearest(
    queries: Float[Tensor, "n D"], bank: Float[Tensor, "N D"], k: int, leave_one_out: bool = False
) -> Int[Tensor, "n k"]:
    """Indices of the k rows most similar to each of any number of queries; with `leave_one_out`,
    the queries are the bank, and none is its own neighbor.
    """
    whole = Bank(bank, min(_QUERIES, len(queries)))
    blocks = torch.split(torch.arange(len(queries)), _QUERIES)
    found = [
        whole.nearest(queries[rows], k, exclude=rows if leave_one_out else None)[1]
        for rows in blocks
    ]
    return torch.cat(found)


class _Best:
    """The k best of each query so far, and candidates: values that were not below the k-th best
    when they were seen. Reduced to k whenever as many candidates have accumulated.
    """

    def __init__(self, k: int) -> None:
        self.k = k
        self.floor: Tensor | None = None

    def look(self, tile: Float[Tensor, "n T"], part: slice) -> None:
        """Add the similarities to one part of the bank."""
        if self.floor is None:
            self.floor = _bound(tile, self.k)
            self.values = tile.new_empty(len(tile), 0)
            self.index = torch.empty(len(tile), 0, dtype=torch.int64, device=tile.device)
        values, columns = _not_below(tile, self.floor)
        self.values = torch.cat([self.values, values], dim=1)
        self.index = torch.cat([self.index, part.start + part.step * columns], dim=1)
        if self.values.shape[1] >= 2 * self.k:
            self.values, self.index = _largest(self.values, self.index, self.k)
            self.floor = self.values[:, -1:]

    def in_order(self) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"]]:
        """The k best, best first, ties by index."""
        return _in_order(*_largest(self.values, self.index, self.k))


def _groups(tile: Float[Tensor, "n T"]) -> Float[Tensor, "n g G"]:
    """Group j is columns j, j + G, j + 2 G ...; the remainder is in no group."""
    num_groups = tile.shape[1] // _GROUP
    return tile[:, : _GROUP * num_groups].view(len(tile), _GROUP, num_groups)


def _bound(tile: Float[Tensor, "n T"], k: int) -> Float[Tensor, "n 1"]:
    """A lower bound of the k-th largest value of each row: the smallest of the k largest maxima."""
    maxima = _groups(tile).amax(dim=1)
    if maxima.shape[1] < k:
        return tile.new_full((len(tile), 1), -torch.inf)
    return maxima.topk(k, dim=1, sorted=False).values.amin(dim=1, keepdim=True)


def _not_below(
    tile: Float[Tensor, "n T"], floor: Float[Tensor, "n 1"]
) -> tuple[Float[Tensor, "n m"], Int[Tensor, "n m"]]:
    """The values of each row that are not below its floor, and their columns; padded with -inf."""
    groups = _groups(tile)
    num_groups = groups.shape[2]
    row, group = (groups.amax(dim=1) >= floor).nonzero(as_tuple=True)  # most groups are below
    value = groups[row, :, group]
    pair, stripe = (value >= floor[row]).nonzero(as_tuple=True)
    row, column, value = row[pair], group[pair] + num_groups * stripe, value[pair, stripe]
    counts = row.bincount(minlength=len(tile))
    place = torch.arange(len(row), device=row.device) - (counts.cumsum(0) - counts)[row]
    most = int(counts.max()) if len(row) else 0
    values, columns = tile.new_full((len(tile), most), -torch.inf), row.new_zeros(len(tile), most)
    values[row, place], columns[row, place] = value, column
    rest = torch.arange(_GROUP * num_groups, tile.shape[1], device=tile.device)
    return (
        torch.cat([values, tile[:, _GROUP * num_groups :]], dim=1),
        torch.cat([columns, rest.expand(len(tile), -1)], dim=1),
    )


def _largest(
    values: Float[Tensor, "n m"], index: Int[Tensor, "n m"], k: int
) -> tuple[Float[Tensor, "n l"], Int[Tensor, "n l"]]:
    """The k largest, largest first, or all if there are fewer; ties by index."""
    if values.shape[1] <= k:
        return values, index
    found, place = values.topk(k + 1, dim=1)
    best, at = found[:, :k].contiguous(), index.gather(1, place[:, :k])
    # topk breaks ties arbitrarily: rows with a tie at the border are sorted.
    tied = found[:, k - 1] == found[:, k]
    if bool(tied.any()):
        ordered = _in_order(values[tied], index[tied])
        best[tied], at[tied] = ordered[0][:, :k], ordered[1][:, :k]
    return best, at


def _in_order(
    values: Float[Tensor, "n m"], index: Int[Tensor, "n m"]
) -> tuple[Float[Tensor, "n m"], Int[Tensor, "n m"]]:
    """Largest first, equals by index."""
    index, order = index.sort(dim=1)
    values, order = values.gather(1, order).sort(dim=1, descending=True, stable=True)
    return values, index.gather(1, order)


@contextmanager
def _full_precision() -> Iterator[None]:
    """True float32 products, regardless of the precision that training has set."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
