"""KoLeo: images are pushed from their nearest neighbor, so that features fill the sphere (DINOv2,
arXiv 2304.07193, section 4; Sablayrolles et al. 2018, arXiv 1806.03198).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from dino_lite.contracts import Loss, Match, Schedule, Targets, Tokens
from dino_lite.distributed import all_gather_rows

_EPS = 1e-8  # DINOv2's


def koleo(
    features: Float[Tensor, "n D"], weight: Float[Tensor, "n"], across_ranks: bool = False
) -> Float[Tensor, ""]:
    """Σ_i weight_i·(−log(d_i + ε)), d_i = |x_i − x_nn(i) + ε|, x the features at length 1, ε = 1e-8
    in every coordinate.

    x_nn(i) is the other row of the largest inner product, of this rank or of all; the choice has no
    gradient, both rows of a pair have one. A lone row is its own neighbor: a constant. Computed in
    at least float32: ε is nothing in half precision, and neighbors are close early in training.
    """
    wide = torch.promote_types(features.dtype, torch.float32)
    with torch.autocast(features.device.type, enabled=False):
        x = F.normalize(features.to(wide), dim=-1, eps=_EPS)
        everyone, first = all_gather_rows(x) if across_ranks else (x, 0)
        with torch.no_grad():
            likeness = x @ everyone.T
            likeness.diagonal(first).fill_(-torch.inf)
            neighbor = likeness.argmax(1)
        distance = torch.linalg.vector_norm(x - everyone[neighbor] + _EPS, dim=-1)
        loss: Tensor = -(weight.to(wide) * (distance + _EPS).log()).sum()
        return loss


class KoLeoLoss(Loss):
    """Adapter: `koleo` of the class features of each global crop by itself, summed over crops.

    Neighbors are looked for among the images of a micro-batch, so its size changes the result; with
    `across_ranks`, among those that all ranks have at the moment.
    """

    cls_only = True

    @staticmethod
    def mixes_images(settings: Mapping[str, Any]) -> bool:
        """Neighbors are searched among the images of a micro-batch."""
        return True

    def __init__(self, reads: str, weight: Schedule, across_ranks: bool = False) -> None:
        self.reads, self.weight, self.across_ranks = reads, weight, across_ranks

    def __call__(self, match: Match) -> Float[Tensor, ""]:
        if not isinstance(match.student, Tokens) or not isinstance(match.target, Targets):
            raise TypeError(f"{self.reads}: KoLeo reads Tokens, and the weights of Targets")
        weight = match.target.weight
        crops = match.student.cls.view(len(match.target.z), len(weight), -1)  # G n D
        return torch.stack([koleo(crop, weight, self.across_ranks) for crop in crops]).sum()
