"""Weighted k-nearest-neighbor classification of frozen features: nothing to train or tune.

Caron et al. 2021, appendix F.1; Wu et al. 2018.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from dino_lite.contracts import Backbone, UserError
from dino_lite.eval.features import Features, device_of
from dino_lite.eval.results import result
from dino_lite.eval.store import FeatureStore

_CELLS = 2**25  # similarities held at once: 128 MB, whatever the sizes of bank and test
_HEADLINE_K = 20  # usually the best of the four (DINO, appendix F.1)


class Accuracy(NamedTuple):
    """Percent of queries whose class has most votes, or is among the min(5, k) with most."""

    top1: float
    top5: float


class KNN:
    """The evaluation: test images, or without any each training image, against (the other) train.

    Values of `ks` above the size of the bank mean the whole bank.
    """

    def __init__(self, ks: Sequence[int] = (10, 20, 100, 200), temperature: float = 0.07) -> None:
        if not ks or min(ks) < 1:
            raise UserError(f"eval.knn.ks={list(ks)}: give at least one number, each 1 or more.")
        if not (math.isfinite(temperature) and temperature > 0):
            raise UserError(f"eval.knn.temperature={temperature}: it must be greater than 0.")
        self.ks, self.temperature = list(ks), temperature

    def __call__(self, backbone: Backbone, store: FeatureStore) -> dict[str, Any]:
        """Accuracies of the CLS features by k, the protocol in words, and `top1` at k = 20."""
        bank, queries = store.labeled(backbone, "k-NN")
        asked = None if queries is None else queries.features()
        return self.score(bank.features(), asked, device_of(backbone))

    def score(
        self, bank: Features, queries: Features | None, device: torch.device | None = None
    ) -> dict[str, Any]:
        """As calling it, from features; without queries each row of the bank is left out once."""
        bank = bank.labeled()
        asked_of = queries.labeled() if queries is not None else bank
        if bank.num_classes < 2:
            raise UserError("k-NN needs labeled training images of at least 2 classes.")
        if len(asked_of.labels) == 0:
            raise UserError("k-NN found no labeled test image; see data.labels.")
        for part in (bank, asked_of):
            if not bool(torch.isfinite(part.features).all()):
                raise UserError(
                    "k-NN got features that are not finite: the network has diverged; evaluate an "
                    "earlier checkpoint, or train anew with a lower optim.rate."
                )
        limit = len(bank.labels) - (queries is None)
        used = {k: min(k, limit) for k in self.ks}
        by_k = knn_accuracy(
            asked_of,
            bank,
            sorted(set(used.values())),
            self.temperature,
            leave_one_out=queries is None,
            device=device,
        )
        table = {
            str(k): {"asked": [a for a in self.ks if used[a] == k], **accuracy._asdict()}
            for k, accuracy in by_k.items()
        }
        headline = min(by_k, key=lambda k: (abs(k - _HEADLINE_K), k))
        num_queries = None if queries is None else len(asked_of.labels)
        return result(
            "k-NN top-1",
            by_k[headline].top1,
            protocol=self._protocol(len(bank.labels), num_queries),
            settings={"k": headline, "temperature": self.temperature},
            num_train=len(bank.labels),
            num_test=len(asked_of.labels),
            k=table,
            table=[{"k": k, "top-1 %": a.top1, "top-5 %": a.top5} for k, a in by_k.items()],
            top1=by_k[headline].top1,
            top1_k=headline,
        )

    def _protocol(self, num_bank: int, num_queries: int | None) -> str:
        images = (
            f"leave-one-out on train ({num_bank} images)"
            if num_queries is None
            else f"bank = train ({num_bank} images), queries = test ({num_queries} images)"
        )
        return f"weighted k-NN, cosine, T={self.temperature:g}, CLS features, {images}"


def knn_accuracy(
    queries: Features,
    bank: Features,
    ks: Sequence[int],
    temperature: float,
    *,
    leave_one_out: bool = False,
    device: torch.device | None = None,
) -> dict[int, Accuracy]:
    """Accuracy at each k of `ks` (none above the bank's size).

    `leave_one_out`: query i is row i of the bank, and not its own neighbor. Of classes with equal
    votes the lower number comes first, those without votes included, as in the reference (so where
    a small k leaves fewer than five classes with votes, top-5 also counts the lowest numbers of the
    rest). Memory is bounded: queries go through in blocks, their votes in a block x classes table.
    """
    device = device or torch.device("cpu")
    every_label = torch.cat([bank.labels, queries.labels])
    classes, numbers = torch.unique(every_label, return_inverse=True)
    bank_classes, query_classes = numbers.split([len(bank.labels), len(queries.labels)])
    rows_in_bank = unit(bank.features.to(device))
    num_queries, num_classes = len(query_classes), len(classes)
    block = max(1, _CELLS // max(len(rows_in_bank), num_classes))
    hits = {k: torch.zeros(2, dtype=torch.long) for k in ks}
    for start in range(0, num_queries, block):
        rows = torch.arange(start, min(start + block, num_queries))
        similarity, index = nearest(
            unit(queries.features[rows].to(device)),
            rows_in_bank,
            max(ks),
            exclude=rows.to(device) if leave_one_out else None,
        )
        # A shift scales all votes of a query alike, and keeps exp finite at any temperature.
        similarity = similarity.cpu() - similarity[:, :1].cpu()
        neighbors = bank_classes[index.cpu()]
        for k in ks:
            votes = knn_votes(similarity[:, :k], neighbors[:, :k], temperature, num_classes)
            place = _place(votes, query_classes[rows])
            hits[k] += torch.stack([(place < 1).sum(), (place < min(5, k)).sum()])
    return {k: Accuracy(*(100.0 * hits[k].double() / num_queries).tolist()) for k in ks}


def nearest(
    queries: Float[Tensor, "n D"],
    bank: Float[Tensor, "N D"],
    k: int,
    exclude: Int[Tensor, "n"] | None = None,
) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"]]:
    """The k rows of `bank` most similar to each query, most similar first; both are unit rows.

    Of equally similar rows the one with the lower index comes first, and is kept. `exclude` names
    a row for each query to pass by.
    """
    with _full_precision():
        similarity = queries @ bank.T
    if exclude is not None:
        similarity.scatter_(1, exclude[:, None], -torch.inf)
    values, index = similarity.topk(min(k + 1, len(bank)), dim=1)
    if (
        len(bank) > k
    ):  # topk keeps any of several equals: where the border cuts through some, choose anew
        border, values, index = values[:, k], values[:, :k], index[:, :k]
        tied = border == values[:, -1]
        if bool(tied.any()):
            index[tied] = _first_best(similarity[tied], values[tied, -1:], k)
            values = similarity.gather(1, index)
    index, order = index.sort(dim=1)
    values, order = values.gather(1, order).sort(dim=1, descending=True, stable=True)
    return values, index.gather(1, order)


def knn_votes(
    similarity: Float[Tensor, "n k"],
    classes: Int[Tensor, "n k"],
    temperature: float,
    num_classes: int,
) -> Float[Tensor, "n C"]:
    """Sum of exp(similarity / temperature) over the neighbors of each class, in float64."""
    weight = (similarity.double() / temperature).exp()
    votes = weight.new_zeros(len(similarity), num_classes)
    return votes.scatter_add_(1, classes, weight)


def unit(features: Float[Tensor, "n D"]) -> Float[Tensor, "n D"]:
    """Rows of length 1; a row of zeros stays one."""
    return F.normalize(features, dim=1, eps=1e-12)


def _first_best(
    similarity: Float[Tensor, "n N"], border: Float[Tensor, "n 1"], k: int
) -> Int[Tensor, "n k"]:
    """Columns above each row's border, filled up to k by the first of those on it."""
    above, on = similarity > border, similarity == border
    room = k - above.sum(dim=1, keepdim=True)
    taken = above | (on & (on.cumsum(dim=1, dtype=torch.int32) <= room))
    return taken.nonzero()[:, 1].reshape(len(similarity), k)


def _place(votes: Float[Tensor, "n C"], classes: Int[Tensor, "n"]) -> Int[Tensor, "n"]:
    """How many classes come before each query's own: with more votes, or as many and lower."""
    own = votes.gather(1, classes[:, None])
    lower = torch.arange(votes.shape[1]) < classes[:, None]
    return ((votes > own) | ((votes == own) & lower)).sum(dim=1)


@contextmanager
def _full_precision() -> Iterator[None]:
    """Similarities in true float32, whatever speed training has chosen for its matmuls."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
