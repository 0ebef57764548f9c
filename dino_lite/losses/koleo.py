"""KoLeo: spreads features over the sphere by repelling nearest neighbors (DINOv2, arXiv 2304.07193,
section 4; Sablayrolles et al. 2018, arXiv 1806.03198).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from dino_lite.contracts import Loss, Match, MatchError, Schedule, Targets, Tokens
from dino_lite.distributed import all_gather_rows

_EPS = 1e-8  # DINOv2's


def koleo(
    features: Float[Tensor, "n D"], weight: Float[Tensor, "n"], across_ranks: bool = False
) -> Float[Tensor, ""]:
    """Σ_i weight_i·(−log(d_i + ε)), d_i = ‖x_i − x_nn(i) + ε‖, with x the L2-normalized features
    and ε = 1e-8, in d_i added to every coordinate.

    x_nn(i) is the other row with the largest inner product, on this rank or (`across_ranks`) on
    all. The choice has no gradient; both rows of a pair have one. A single row is its own neighbor,
    which gives a constant. Computed in at least float32: ε vanishes in half precision, and
    neighbors are close early in training.
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
    """Adapter: `koleo` of the class features, separately for each global crop, summed over crops.

    Neighbors are searched within the micro-batch (with `across_ranks`, within the current
    micro-batches of all ranks), so the micro-batch size affects the result.
    """

    cls_only = True

    @staticmethod
    def mixes_images(settings: Mapping[str, Any]) -> bool:
        """True: neighbors are searched within a micro-batch."""
        return True

    def __init__(self, reads: str, weight: Schedule, across_ranks: bool = False) -> None:
        self.reads, self.weight, self.across_ranks = reads, weight, across_ranks

    def __call__(self, match: Match) -> Float[Tensor, ""]:
        if not isinstance(match.student, Tokens) or not isinstance(match.target, Targets):
            raise MatchError(f"{self.reads}: KoLeo reads Tokens, and the weights of Targets")
        weight = match.target.weight
        crops = match.student.cls.view(len(match.target.z), len(weight), -1)  # G n D
        return torch.stack([koleo(crop, weight, self.across_ranks) for crop in crops]).sum()
