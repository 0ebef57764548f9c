"""Numbers that say how good predictions are, beside the share that is right."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Int
from torch import Tensor


def mean_per_class(correct: Bool[Tensor, "n"], labels: Int[Tensor, "n"]) -> float:
    """Percent right of each class, averaged over the classes that are there: none counts for more
    because it has more images.
    """
    _, numbers, counts = torch.unique(labels, return_inverse=True, return_counts=True)
    right = torch.zeros(len(counts), dtype=torch.float64)
    right.index_add_(0, numbers, correct.double())
    return float(100 * (right / counts).mean())
