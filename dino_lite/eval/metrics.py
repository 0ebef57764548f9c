"""Numbers that say how good predictions are, beside the share that is right."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def mean_per_class(correct: Bool[Tensor, "n"], labels: Int[Tensor, "n"]) -> float:
    """Percent right of each class, averaged over the classes that are there: none counts for more
    because it has more images.
    """
    _, numbers, counts = torch.unique(labels, return_inverse=True, return_counts=True)
    right = torch.zeros(len(counts), dtype=torch.float64)
    right.index_add_(0, numbers, correct.double())
    return float(100 * (right / counts).mean())


def average_precision(scores: Float[Tensor, "n"], truth: Bool[Tensor, "n"]) -> float:
    """Area under precision over recall, as steps without interpolation, in [0, 1]; images of equal
    score come in together. NaN where nothing is true.
    """
    scores, order = scores.double().sort(descending=True, stable=True)
    hits = truth[order].double().cumsum(0)
    last = torch.ones(len(scores), dtype=torch.bool)
    last[:-1] = scores[1:] != scores[:-1]  # of those that are equal
    hits, taken = hits[last], torch.arange(1, len(scores) + 1)[last]
    gained = torch.diff(hits, prepend=hits.new_zeros(1))
    return float((gained * hits / taken).sum() / truth.sum())


def mean_average_precision(
    scores: Float[Tensor, "n L"], truth: Bool[Tensor, "n L"]
) -> tuple[float, list[float]]:
    """Mean over the labels that an image has, and the precision of each label (NaN: none has it);
    percent.
    """
    each = [100 * average_precision(*columns) for columns in zip(scores.T, truth.T, strict=True)]
    known = [value for value in each if value == value]
    return (sum(known) / len(known) if known else float("nan")), each


def explained(predicted: Float[Tensor, "n"], wanted: Float[Tensor, "n"]) -> Float[Tensor, "n"]:
    """Each image's part of R², which is the mean: 1 - squared error / variance of what is wanted.

    NaN where that is the same for all images.
    """
    wanted = wanted.double()
    errors = (predicted.double() - wanted).square()
    return 1 - errors / (wanted - wanted.mean()).square().mean()
