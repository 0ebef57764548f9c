"""Which class each image's nearest neighbors vote for."""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor

from dino_lite.eval.features import Features
from dino_lite.eval.knn import knn_votes, nearest, unit

_CELLS = 2**25  # similarities held at once


def voted(
    queries: Features,
    bank: Features,
    k: int = 20,
    temperature: float = 0.07,
    *,
    leave_one_out: bool = False,
    device: torch.device | None = None,
) -> Int[Tensor, "n"]:
    """The label with most votes for each query, as `knn_accuracy` counts them: weighted k-NN, of
    equals the lower. `leave_one_out`: query i is row i of the bank, and not its own neighbor.
    """
    device = device or torch.device("cpu")
    labels, classes = torch.unique(bank.labels, return_inverse=True)
    rows_in_bank = unit(bank.features.to(device))
    k = min(k, len(classes) - leave_one_out)
    found = []
    for rows in torch.split(torch.arange(len(queries.labels)), max(1, _CELLS // len(classes))):
        similarity, index = nearest(
            unit(queries.features[rows].to(device)),
            rows_in_bank,
            k,
            exclude=rows.to(device) if leave_one_out else None,
        )
        similarity = similarity.cpu() - similarity[:, :1].cpu()  # keeps exp finite
        votes = knn_votes(similarity, classes[index.cpu()], temperature, len(labels))
        found.append(labels[votes.argmax(dim=1)])
    return torch.cat(found)
