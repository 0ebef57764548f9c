"""Weighted k-nearest-neighbor classification of frozen features, without training.

Caron et al. 2021, appendix F.1; Wu et al. 2018.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dino_lite.contracts import Backbone, Evaluation, UserError
from dino_lite.eval.features import Features, check_finite, device_of
from dino_lite.eval.metrics import mean_per_class
from dino_lite.eval.neighbors import Bank
from dino_lite.eval.results import percent, reduced, result
from dino_lite.eval.store import FeatureStore
from dino_lite.meter import metered
from dino_lite.settings.kinds import Positive, Sizes
from dino_lite.settings.validate import checked

_QUERIES = 1024  # per block: enough for a fast product with the bank
_VOTES = 2**17  # held at once: 1 MB for any number of classes
_HEADLINE_K = 20  # usually the best of the four (DINO, appendix F.1)


class Accuracy(NamedTuple):
    """Percent of queries whose class has most votes, or is among the min(5, k) with most."""

    top1: float
    top5: float


class Answers(NamedTuple):
    """For each query: the predicted class, and the number of classes ranked before its own (more
    votes, or as many and a lower number).
    """

    predicted: Int[Tensor, "n"]
    place: Int[Tensor, "n"]

    def correct(self, top: int = 1) -> Bool[Tensor, "n"]:
        """Whether a query's own class is among the `top` first."""
        return self.place < top

    def accuracy(self, k: int) -> Accuracy:
        """Top-1 and top-5 accuracy of k neighbors."""
        top1, top5 = (percent(self.correct(top)).mean() for top in (1, min(5, k)))
        return Accuracy(float(top1), float(top5))


class KNN(Evaluation):
    """Evaluation by k-NN: test images against train; without a test split, leave-one-out on train.

    Values of `ks` above the size of the bank are reduced to it, with a note.
    """

    @checked
    def __init__(self, ks: Sizes = (10, 20, 100, 200), temperature: Positive = 0.07) -> None:
        self.ks, self.temperature = list(ks), temperature

    def __call__(self, backbone: Backbone, store: FeatureStore) -> dict[str, Any]:
        """Accuracies of the CLS features by k, the protocol in words, `top1` at k = 20, and the
        mean over classes, `per_class`.
        """
        bank, queries = store.labeled(backbone, "k-NN")
        asked = None if queries is None else queries.features()
        return self.score(bank.features(), asked, device_of(backbone))

    def score(
        self, bank: Features, queries: Features | None, device: torch.device | None = None
    ) -> dict[str, Any]:
        """As `__call__`, from features; leave-one-out on the bank without queries."""
        bank = bank.labeled()
        asked_of = queries.labeled() if queries is not None else bank
        if bank.num_classes < 2:
            raise UserError("k-NN needs labeled training images of at least 2 classes.")
        if len(asked_of.labels) == 0:
            raise UserError("k-NN found no labeled test image; see data.labels.")
        for part in (bank, asked_of):
            check_finite("k-NN", part.features)
        limit = len(bank.labels) - (queries is None)
        used = {k: min(k, limit) for k in self.ks}
        answers = knn_answers(
            asked_of,
            bank,
            sorted(set(used.values())),
            self.temperature,
            leave_one_out=queries is None,
            device=device,
        )
        by_k = {k: found.accuracy(k) for k, found in answers.items()}
        each = {k: mean_per_class(a.correct(), asked_of.labels) for k, a in answers.items()}
        table = {
            str(k): {
                "asked": [a for a in self.ks if used[a] == k],
                **accuracy._asdict(),
                "per_class": each[k],
            }
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
            scores=percent(answers[headline].correct()),
            notes=reduced("k", self.ks, limit, "all images that there are"),
            k=table,
            table=[
                {"k": k, "top-1 %": a.top1, "top-5 %": a.top5, "mean per class %": each[k]}
                for k, a in by_k.items()
            ],
            top1=by_k[headline].top1,
            top1_k=headline,
            per_class=each[headline],
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
    """Accuracy at each k of `ks` (none above the bank's size); see `knn_answers`."""
    answers = knn_answers(
        queries, bank, ks, temperature, leave_one_out=leave_one_out, device=device
    )
    return {k: found.accuracy(k) for k, found in answers.items()}


def knn_predict(
    queries: Features,
    bank: Features,
    k: int,
    temperature: float = 0.07,
    leave_one_out: bool = False,
    device: torch.device | None = None,
) -> Int[Tensor, "n"]:
    """The predicted label of each query, for a confusion matrix."""
    answers = knn_answers(
        queries, bank, [k], temperature, leave_one_out=leave_one_out, device=device
    )
    return answers[k].predicted


def knn_answers(
    queries: Features,
    bank: Features,
    ks: Sequence[int],
    temperature: float,
    *,
    leave_one_out: bool = False,
    device: torch.device | None = None,
) -> dict[int, Answers]:
    """Classify each query by its k nearest in the bank, for each k of `ks` (none above the bank's
    size), from one search.

    `leave_one_out`: query i is row i of the bank, and is excluded from its own neighbors. Classes
    with equal votes are ranked by number, including those without votes, as in the reference (so if
    a small k gives fewer than five classes votes, top-5 also counts the lowest of the others).
    Memory is bounded: queries are processed in blocks, and votes in smaller ones.
    """
    device = device or torch.device("cpu")
    every_label = torch.cat([bank.labels, queries.labels])
    labels, numbers = torch.unique(every_label, return_inverse=True)
    bank_classes, query_classes = numbers.split([len(bank.labels), len(queries.labels)])
    whole = Bank(bank.features.to(device), min(_QUERIES, len(query_classes)))
    parts: dict[int, list[Answers]] = {k: [] for k in ks}
    blocks = _blocks(len(query_classes), _QUERIES)
    for rows in metered(blocks, len(query_classes), "nearest neighbors", "queries", _QUERIES):
        asked = torch.arange(rows.start, rows.stop, device=device)
        similarity, index = whole.nearest(
            queries.features[rows].to(device), max(ks), exclude=asked if leave_one_out else None
        )
        similarity, neighbors = similarity.cpu(), bank_classes[index.cpu()]
        for few in _blocks(len(asked), max(1, _VOTES // len(labels))):
            own = query_classes[rows][few]
            votes_of = knn_probs(similarity[few], neighbors[few], ks, temperature, len(labels))
            for k, votes in votes_of:
                parts[k].append(Answers(labels[votes.argmax(dim=1)], _place(votes, own)))
    return {k: Answers(*map(torch.cat, zip(*found, strict=True))) for k, found in parts.items()}


def knn_probs(
    similarity: Float[Tensor, "n m"],
    classes: Int[Tensor, "n m"],
    ks: Sequence[int],
    temperature: float,
    num_classes: int,
) -> Iterator[tuple[int, Float[Tensor, "n C"]]]:
    """For each k the votes of the first k of m neighbors, as fractions of the votes of all m: those
    at k = m sum to 1 (DINOv2's k-NN). The common factor keeps exp finite at any temperature.
    """
    exponent = similarity.double() / temperature
    similarity = temperature * (exponent - exponent.logsumexp(dim=1, keepdim=True))
    for k in ks:
        yield k, knn_votes(similarity[:, :k], classes[:, :k], temperature, num_classes)


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


def _blocks(num: int, size: int) -> list[slice]:
    """Consecutive slices of at most `size` rows."""
    return [slice(i, min(i + size, num)) for i in range(0, num, size)]


def _place(votes: Float[Tensor, "n C"], classes: Int[Tensor, "n"]) -> Int[Tensor, "n"]:
    """The number of classes ranked before each query's own: more votes, or as many and a lower
    number.
    """
    own = votes.gather(1, classes[:, None])
    lower = torch.arange(votes.shape[1]) < classes[:, None]
    return ((votes > own) | ((votes == own) & lower)).sum(dim=1)
