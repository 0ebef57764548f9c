"""Straightforward implementation of the published weighted k-NN: the reference of bench_knn.py.

Processes the test set in 100 parts: similarities to the whole bank, topk, one-hot classes of the
neighbors weighted by exp(similarity / T) and summed, then all classes sorted by their votes.
Written from notes on it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

PARTS = 100


def plain_knn(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    ks: Sequence[int],
    temperature: float,
    num_classes: int,
) -> dict[int, tuple[float, float]]:
    """Top-1 and top-5 in percent by k, for unit rows; one search is used for all ks."""
    size = len(test) // PARTS
    hits = {k: [0, 0] for k in ks}
    for start in range(0, len(test), size):
        targets = test_labels[start : start + size]
        similarity = test[start : start + size] @ train.T
        values, index = similarity.topk(max(ks), dim=1, largest=True, sorted=True)
        neighbors = train_labels[index]
        for k in ks:
            one_hot = torch.zeros(len(targets) * k, num_classes)
            one_hot.scatter_(1, neighbors[:, :k].reshape(-1, 1), 1.0)
            weights = (values[:, :k] / temperature).exp()
            votes = (one_hot.view(len(targets), k, num_classes) * weights[:, :, None]).sum(dim=1)
            order = votes.sort(dim=1, descending=True).indices
            correct = order == targets[:, None]
            hits[k][0] += int(correct[:, :1].sum())
            hits[k][1] += int(correct[:, : min(5, k)].sum())
    return {k: (100 * a / len(test), 100 * b / len(test)) for k, (a, b) in hits.items()}
