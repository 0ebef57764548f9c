"""Image retrieval: images of the query's class in train, ranked by similarity."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dino_lite.contracts import Backbone, Evaluation, UserError
from dino_lite.eval.features import Features, check_finite, device_of
from dino_lite.eval.metrics import last_equal
from dino_lite.eval.neighbors import Bank
from dino_lite.eval.results import percent, result
from dino_lite.eval.store import FeatureStore
from dino_lite.meter import metered
from dino_lite.settings.kinds import Sizes
from dino_lite.settings.validate import checked

_CELLS = 2**22  # similarities sorted at once


class Ranking(NamedTuple):
    """For each query: average precision in [0, 1] of the images of its class, and the rank (from 0)
    of the first. Queries without such an image have NaN and the bank's size.
    """

    precision: Float[Tensor, "n"]
    first: Int[Tensor, "n"]


class Retrieval(Evaluation):
    """Evaluation by retrieval: each test image ranks train; without a test split, each training
    image ranks the others.

    mAP: mean over queries of average precision over the whole ranking; recall@k: fraction of
    queries with an image of their class among the first k (Song et al. 2016).
    """

    @checked
    def __init__(self, ks: Sizes = (1, 5, 10)) -> None:
        self.ks = sorted(set(ks))

    def __call__(self, backbone: Backbone, store: FeatureStore) -> dict[str, Any]:
        """mAP and recall of the CLS features."""
        bank, queries = store.labeled(backbone, "Retrieval")
        asked = None if queries is None else queries.features()
        return self.score(bank.features(), asked, device_of(backbone))

    def score(
        self, bank: Features, queries: Features | None, device: torch.device | None = None
    ) -> dict[str, Any]:
        """As `__call__`, from features; leave-one-out on the bank without queries."""
        bank = bank.labeled()
        asked = bank if queries is None else queries.labeled()
        for part in (bank, asked):
            check_finite("Retrieval", part.features)
        ranking = rank_classes(asked, bank, leave_one_out=queries is None, device=device)
        found = ~ranking.precision.isnan()
        if not bool(found.any()):
            raise UserError(
                "Retrieval needs labeled images that share their class with one of train; "
                "see data.labels."
            )
        scores, first = 100 * ranking.precision[found], ranking.first[found]
        recall = {k: float(percent(first < k).mean()) for k in self.ks}
        images = (
            f"leave-one-out on train ({len(bank.labels)} images)"
            if queries is None
            else f"test ({len(asked.labels)} images) against train ({len(bank.labels)})"
        )
        limit = len(bank.labels) - (queries is None)
        alone = int((~found).sum())
        left_out = f"; {alone} without an image to find are left out" if alone else ""
        return result(
            "retrieval mAP",
            float(scores.mean()),
            protocol=(
                f"same class, cosine, whole ranking, ties share a rank, CLS features, "
                f"{images}{left_out}"
            ),
            settings={},
            num_train=len(bank.labels),
            num_test=len(scores),
            scores=scores,
            notes=[f"k={k}: all of the {limit:,} images" for k in self.ks if k >= limit],
            recall={str(k): value for k, value in recall.items()},
            table=[{"k": k, "recall %": value} for k, value in recall.items()],
        )


def rank_classes(
    queries: Features,
    bank: Features,
    *,
    leave_one_out: bool = False,
    device: torch.device | None = None,
) -> Ranking:
    """Rank the bank for each query, most similar first; ties share the rank of the last of them, so
    that the order of the bank has no influence.

    `leave_one_out`: query i is row i of the bank and ranks all the others.
    """
    device = device or torch.device("cpu")
    labels = bank.labels.to(device)
    block = min(len(queries.labels), max(1, _CELLS // max(1, len(labels))))
    whole = Bank(bank.features.to(device), block)
    parts = []
    blocks = range(0, len(queries.labels), max(1, block))
    for start in metered(blocks, len(queries.labels), "ranking", "queries", block):
        rows = torch.arange(start, min(start + block, len(queries.labels)))
        asked, wanted = queries.features[rows].to(device), queries.labels[rows].to(device)
        similarity = asked.new_empty(len(asked), len(labels))
        for part, tile in whole.similarities(asked):
            similarity[:, part] = tile
        own = labels == wanted[:, None]  # n N
        if leave_one_out:  # ranked last, and of no class
            place = rows.to(device)[:, None]
            similarity.scatter_(1, place, -torch.inf)
            own.scatter_(1, place, False)
        ranked, order = similarity.sort(dim=1, descending=True)
        parts.append(_ranking(own.gather(1, order), last_equal(ranked)))
    empty = Ranking(torch.zeros(0, dtype=torch.float64), torch.zeros(0, dtype=torch.int64))
    return Ranking(*map(torch.cat, zip(empty, *parts, strict=True)))


def _ranking(own: Bool[Tensor, "n N"], last: Int[Tensor, "n N"]) -> Ranking:
    """From whether each ranked image has the query's class, and the rank of its last equal."""
    hits = own.cumsum(dim=1, dtype=torch.int32)
    row, place = own.nonzero(as_tuple=True)
    end = last[row, place]
    precision = hits[row, end].cpu().double() / (end.cpu() + 1)
    total = torch.zeros(len(own), dtype=torch.float64).index_add_(0, row.cpu(), precision)
    first = torch.full((len(own),), own.shape[1])
    first.scatter_reduce_(0, row.cpu(), end.cpu(), "amin")
    return Ranking(total / hits[:, -1].cpu(), first)
