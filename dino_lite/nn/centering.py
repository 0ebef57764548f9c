"""How the teacher's logits are kept from agreeing on one prototype."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from dino_lite.contracts import Prototypes
from dino_lite.distributed import all_reduce_mean_


class EMACentering(nn.Module):
    """Subtract a running mean of the teacher's logits (DINO, section 3.1, eq. 4): c ← m·c +
    (1−m)·mean over all ranks.

    A step uses the center of the steps before it; its own mean is kept in `batch_center` until the
    step is known good.
    """

    center: Tensor
    batch_center: Tensor

    def __init__(self, num_prototypes: int, momentum: float = 0.9) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("center", torch.zeros(num_prototypes))
        self.register_buffer("batch_center", torch.zeros(num_prototypes), persistent=False)

    @torch.no_grad()
    def forward(
        self, z: Float[Tensor, "T n E"], prototypes: Prototypes, temp: float
    ) -> tuple[Float[Tensor, "T n"], Float[Tensor, "K"]]:
        """Row and column terms of log softmax((z·Pᵀ − c) / temp), for `contracts.Targets`."""
        wide = torch.promote_types(z.dtype, torch.float32)
        col = -self.center.to(wide) / temp
        # Cosines are divided by temp: no bfloat16.
        with torch.autocast(z.device.type, enabled=False):
            # Prototype-major, "K T*n": the product is quickest so.
            logits = prototypes.direction.to(wide) @ (z.to(wide) / temp).flatten(0, 1).T
            scale = prototypes.scale()
            if scale is not None:
                logits.mul_(scale)
            row = -logits.add_(col[:, None]).logsumexp(0).view(z.shape[:2])
            # The mean of logits is the logits of the mean: E numbers travel between the ranks
            # instead of K.
            mean = all_reduce_mean_(z.to(wide).mean(dim=(0, 1)))
            mean = prototypes.direction.to(wide) @ mean
            self.batch_center = (mean if scale is None else scale[:, 0] * mean).to(
                self.center.dtype
            )
        return row, col

    @torch.no_grad()
    def after_step(self, ok: Bool[Tensor, ""]) -> None:
        """Fold the step's mean into the center, unless the step was skipped."""
        moved = torch.lerp(self.batch_center, self.center, self.momentum)
        self.center.copy_(torch.where(ok, moved, self.center))
