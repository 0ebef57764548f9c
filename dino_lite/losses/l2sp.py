"""L2-SP: weights are pulled to those they began with instead of to zero (Li et al. 2018,
arXiv 1802.01483, section 3).
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from dino_lite.contracts import Backbone, Penalty, Schedule


class L2SP(Penalty):
    """½·Σ(w − w⁰)² over the trained weights of the backbone, whose gradient is w − w⁰."""

    def __init__(self, weight: Schedule) -> None:
        self.weight = weight

    def __call__(self, backbone: Backbone, start: Backbone) -> Float[Tensor, ""]:
        """The sum; 0 while nothing of the backbone is trained."""
        first = dict(start.named_parameters())
        total: Tensor = next(backbone.parameters()).new_zeros(())
        for name, parameter in backbone.named_parameters():
            if parameter.requires_grad:
                total = total + (parameter - first[name].detach()).square().sum()
        return total / 2
