"""Near duplicates in feature space: within train, and between test and train."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from dino_lite.contracts import Backbone, Evaluation, UserError
from dino_lite.data.hashing import linked_groups
from dino_lite.data.sources import reason
from dino_lite.data.statistics import count_duplicates
from dino_lite.distributed import rank
from dino_lite.eval.features import check_finite, device_of
from dino_lite.eval.neighbors import Bank
from dino_lite.eval.results import result
from dino_lite.eval.store import FeatureStore
from dino_lite.settings.kinds import Share
from dino_lite.settings.validate import checked

_QUERIES = 1024  # rows compared with the others at once
_ROUNDING = 1e-6  # equal images may have a cosine of 1 minus this
_SHOWN = 10  # pairs in the table
_COLUMNS = ("similarity", "image of train", "split", "again as")
_MOST = 1_000_000  # pairs kept: with an untrained network there is no bound


class Pairs(NamedTuple):
    """Pairs of rows, the first in train and before the second, and their cosine; most similar
    first. `total` includes the pairs that were too many to keep.
    """

    first: Int[Tensor, "n"]
    second: Int[Tensor, "n"]
    similarity: Float[Tensor, "n"]
    total: int


class Duplicates(Evaluation):
    """Evaluation that lists pairs of images whose CLS features have a cosine of at least
    `threshold`, within train and between train and test. Labels are not used. Every pair is written
    to the CSV file `out`; the most similar are shown.
    """

    has_baselines = False  # a list of the user's images needs no baseline

    @checked
    def __init__(self, threshold: Share = 0.95, out: str | None = None) -> None:
        self.threshold, self.out = threshold, None if out is None else Path(out)

    def __call__(self, backbone: Backbone, store: FeatureStore) -> dict[str, Any]:
        """The number of pairs, and of the groups that they connect."""
        train, test = store.data.splits[:2]
        sources = [train] if test is None else [train, test]
        parts = [store.pooled(backbone, source).features() for source in sources]
        for part in parts:
            check_finite("The search for duplicates", part.features)
        rows, num_train = torch.cat([part.features for part in parts]), len(parts[0].labels)
        pairs = similar_pairs(rows, num_train, self.threshold, device_of(backbone))
        images = [
            (split, source.name(i))
            for split, source, part in zip(("train", "test"), sources, parts, strict=False)
            for i in cast(Tensor, part.index).tolist()
        ]
        if self.out is not None and rank() == 0:
            _write(self.out, _records(pairs, images))
        links = linked_groups(len(rows), pairs.first.numpy(), pairs.second.numpy())
        groups: dict[str, Any] = {**count_duplicates(links, np.arange(len(rows)) >= num_train)}
        kept = len(pairs.first)
        many = f"; the {kept:,} most similar are kept" if kept < pairs.total else ""
        return result(
            "near duplicates",
            pairs.total,
            protocol=(
                f"cosine of CLS features at least {self.threshold:g}, within train ({num_train} "
                f"images) and between train and test ({len(rows) - num_train}){many}"
            ),
            settings={"threshold": self.threshold},
            num_train=num_train,
            num_test=len(rows) - num_train,
            unit="pairs",
            **groups,
            table=list(islice(_records(pairs, images), _SHOWN)),
        )


def similar_pairs(
    rows: Float[Tensor, "N D"],
    num_train: int,
    threshold: float,
    device: torch.device | None = None,
) -> Pairs:
    """Pairs of rows with a cosine of at least `threshold`, at least one of the first `num_train`.

    Memory is bounded: of more than two million pairs the most similar are kept.
    """
    device = device or torch.device("cpu")
    rows = rows.to(device)
    kept = torch.zeros(3, 0, dtype=torch.float64)  # first, second, similarity; rows are below 2^53
    total = 0
    for top in range(0, len(rows), _QUERIES):
        asked = torch.arange(top, min(top + _QUERIES, len(rows)), device=device)
        before = Bank(rows[: min(num_train, top + _QUERIES)], len(asked))
        for part, tile in before.similarities(rows[asked]):
            columns = torch.arange(len(before.features), device=device)[part]
            tile.masked_fill_(columns >= asked[:, None], -torch.inf)
            second, first = (tile >= threshold - _ROUNDING).nonzero(as_tuple=True)
            found = (columns[first], asked[second], tile[second, first])
            kept = torch.cat([kept, torch.stack([a.cpu().double() for a in found])], dim=1)
            total += len(first)
            if kept.shape[1] > 2 * _MOST:
                kept = kept[:, kept[2].topk(_MOST).indices]
    order = np.lexsort((kept[1].numpy(), kept[0].numpy(), -kept[2].numpy()))[:_MOST]
    first, second, similarity = kept[:, torch.from_numpy(order)]
    return Pairs(first.long(), second.long(), similarity.float().clamp(max=1), total)


def _records(pairs: Pairs, images: list[tuple[str, str]]) -> Iterator[dict[str, str]]:
    """One record per pair, as in the table and the CSV file."""
    found = (part.tolist() for part in (pairs.first, pairs.second, pairs.similarity))
    for first, second, similarity in zip(*found, strict=True):
        (_, image), (split, again) = images[first], images[second]
        values = (f"{similarity:.4f}", image, split, again)
        yield dict(zip(_COLUMNS, values, strict=True))


def _write(path: Path, records: Iterator[dict[str, str]]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
            writer = csv.DictWriter(file, _COLUMNS)
            writer.writeheader()
            writer.writerows(records)
    except OSError as error:
        raise UserError(f"eval.duplicates.out={path} cannot be written: {reason(error)}.") from None
