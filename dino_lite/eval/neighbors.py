"""The most similar of many features: exact, and in tiles that fit a processor's cache."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

_CELLS = 2**22  # similarities held at once: 16 MB, whatever the sizes of bank and queries
_ALIGNED = 16  # rows of similarities begin at multiples of it: else products take a third longer
_GROUP = 8  # columns whose largest value is looked at first


def unit(features: Float[Tensor, "n D"]) -> Float[Tensor, "n D"]:
    """Rows of length 1; a row of zeros stays one."""
    return F.normalize(features, dim=1, eps=1e-12)


def similarities(
    queries: Float[Tensor, "n D"], bank: Float[Tensor, "N D"]
) -> Iterator[tuple[slice, Float[Tensor, "n T"]]]:
    """Which rows of the bank, and the cosines of all queries with them: part after part.

    Parts are spread over the bank, so that each is a sample of it where it is sorted by class. The
    cosines of a part are overwritten by the next.
    """
    queries = unit(queries)
    num_parts = min(len(bank), max(1, math.ceil(len(bank) * len(queries) / _CELLS)))
    width = math.ceil(len(bank) / max(1, num_parts))
    room = queries.new_empty(len(queries), math.ceil(width / _ALIGNED) * _ALIGNED)
    for start in range(num_parts):
        rows = slice(start, None, num_parts)
        part = unit(bank[rows])
        tile = room[:, : len(part)]
        with _full_precision():
            torch.mm(queries, part.T, out=tile)
        yield rows, tile


def nearest(
    queries: Float[Tensor, "n D"],
    bank: Float[Tensor, "N D"],
    k: int,
    exclude: Int[Tensor, "n"] | None = None,
) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"]]:
    """Cosine and index of the k rows of `bank` most similar to each query, most similar first.

    Of equally similar rows the one with the lower index comes first, and is kept. `exclude` names
    a row for each query to pass by.

    Of each part only what is not below the k-th best so far is kept, and the k best are chosen anew
    when as much again has come together.
    """
    values = queries.new_empty(len(queries), 0)
    index = torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device)
    floor = None
    for rows, tile in similarities(queries, bank):
        if exclude is not None:
            here = (exclude % rows.step == rows.start).nonzero()[:, 0]
            tile[here, exclude[here] // rows.step] = -torch.inf
        floor = _bound(tile, k) if floor is None else floor
        found, columns = _not_below(tile, floor)
        values = torch.cat([values, found], dim=1)
        index = torch.cat([index, rows.start + rows.step * columns], dim=1)
        if values.shape[1] >= 2 * k:
            values, index = _best(values, index, k)
            floor = values[:, -1:]
    return _in_order(*_best(values, index, k))


def _groups(tile: Float[Tensor, "n T"]) -> Float[Tensor, "n g G"]:
    """Group j is columns j, j + G, j + 2 G ...; the last few are in none."""
    num_groups = tile.shape[1] // _GROUP
    return tile[:, : _GROUP * num_groups].view(len(tile), _GROUP, num_groups)


def _bound(tile: Float[Tensor, "n T"], k: int) -> Float[Tensor, "n 1"]:
    """What k values at least of each row are not below: the least of the k largest maxima."""
    maxima = _groups(tile).amax(dim=1)
    if maxima.shape[1] < k:
        return tile.new_full((len(tile), 1), -torch.inf)
    return maxima.topk(k, dim=1, sorted=False).values.amin(dim=1, keepdim=True)


def _not_below(
    tile: Float[Tensor, "n T"], floor: Float[Tensor, "n 1"]
) -> tuple[Float[Tensor, "n m"], Int[Tensor, "n m"]]:
    """The values of each row that are not below its floor, and their columns; rows with fewer of
    them than others are filled up with -inf.
    """
    groups = _groups(tile)
    num_groups = groups.shape[2]
    row, group = (groups.amax(dim=1) >= floor).nonzero(as_tuple=True)  # most are below: done with
    value = groups[row, :, group]
    pair, stripe = (value >= floor[row]).nonzero(as_tuple=True)
    row, column, value = row[pair], group[pair] + num_groups * stripe, value[pair, stripe]
    counts = row.bincount(minlength=len(tile))
    place = torch.arange(len(row), device=row.device) - (counts.cumsum(0) - counts)[row]
    most = int(counts.max()) if len(row) else 0
    values = tile.new_full((len(tile), most), -torch.inf).index_put((row, place), value)
    columns = row.new_zeros(len(tile), most).index_put((row, place), column)
    rest = torch.arange(_GROUP * num_groups, tile.shape[1], device=tile.device)
    return (
        torch.cat([values, tile[:, _GROUP * num_groups :]], dim=1),
        torch.cat([columns, rest.expand(len(tile), -1)], dim=1),
    )


def _best(
    values: Float[Tensor, "n m"], index: Int[Tensor, "n m"], k: int
) -> tuple[Float[Tensor, "n l"], Int[Tensor, "n l"]]:
    """The k largest, largest first, or all where there are no more; of equals those of the lower
    index.
    """
    if values.shape[1] <= k:
        return values, index
    found, place = values.topk(k + 1, dim=1)
    best, at = found[:, :k].contiguous(), index.gather(1, place[:, :k])
    # topk keeps any of several equals: where the border cuts through some, they are put in order.
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
    """Similarities in true float32, whatever speed training has chosen for its matmuls."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
