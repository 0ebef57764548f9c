"""Measures of predictions other than accuracy."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def mean_per_class(correct: Bool[Tensor, "n"], labels: Int[Tensor, "n"]) -> float:
    """Percent correct of each class, averaged over the classes that occur, so that classes weigh
    the same.
    """
    _, numbers, counts = torch.unique(labels, return_inverse=True, return_counts=True)
    right = torch.zeros(len(counts), dtype=torch.float64)
    right.index_add_(0, numbers, correct.double())
    return float(100 * (right / counts).mean())


def average_precision(scores: Float[Tensor, "n"], truth: Bool[Tensor, "n"]) -> float:
    """Area under the precision-recall curve without interpolation, in [0, 1]; images with equal
    scores are retrieved together. NaN if nothing is true.
    """
    scores, order = scores.double().sort(descending=True, stable=True)
    found = truth[order].double()
    last = last_equal(scores)
    return float((found * found.cumsum(0)[last] / (last + 1)).sum() / truth.sum())


def last_equal(scores: Float[Tensor, "*n N"]) -> Int[Tensor, "*n N"]:
    """The index of the last score equal to each score, in sorted rows."""
    places = torch.arange(scores.shape[-1], device=scores.device).expand(scores.shape).clone()
    places[..., :-1].masked_fill_(scores[..., 1:] == scores[..., :-1], scores.shape[-1])
    return places.flip(-1).cummin(-1).values.flip(-1)


def mean_average_precision(
    scores: Float[Tensor, "n L"], truth: Bool[Tensor, "n L"]
) -> tuple[float, list[float]]:
    """Mean over the labels that occur, and the average precision of each label (NaN: it does not
    occur); percent.
    """
    each = [100 * average_precision(*columns) for columns in zip(scores.T, truth.T, strict=True)]
    known = [value for value in each if value == value]
    return (sum(known) / len(known) if known else float("nan")), each


def explained(
    predicted: Float[Tensor, "n L"], wanted: Float[Tensor, "n L"], times: Float[Tensor, "m n"]
) -> Float[Tensor, "m L"]:
    """R² of each column, 1 - squared error / variance of the target, in m samples that contain each
    image `times` times; NaN if the target is constant in a sample.
    """
    errors = times @ (predicted.double() - wanted.double()).square()
    away = wanted.double() - wanted.double().median(dim=0).values  # reduces cancellation
    squares = times @ away.square()
    spread = squares - (times @ away).square() / times.sum(dim=1, keepdim=True)
    return 1 - errors / spread.where(spread > 1e-12 * squares, torch.nan)
