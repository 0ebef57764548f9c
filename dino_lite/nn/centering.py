"""Centering of the teacher's logits, which prevents collapse to one prototype."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from dino_lite.contracts import LOGITS_BYTES, Prototypes
from dino_lite.distributed import all_reduce_logsumexp, all_reduce_sum_
from dino_lite.settings.kinds import Count, Fraction, Size
from dino_lite.settings.validate import checked


class EMACentering(nn.Module):
    """Subtract a running mean of the teacher's logits (DINO, section 3.1, eq. 4): c ← m·c +
    (1−m)·mean over the rows of all ranks, which may have different numbers of rows, or none.

    A step uses the center of the previous steps; its own mean is held in `batch_center` until
    `after_step`.
    """

    center: Tensor
    batch_center: Tensor

    def __init__(self, num_prototypes: Count, momentum: Fraction = 0.9) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("center", torch.zeros(num_prototypes))
        self.register_buffer("batch_center", torch.zeros(num_prototypes), persistent=False)

    @torch.no_grad()
    def forward(
        self, z: Float[Tensor, "T n E"], prototypes: Prototypes, temp: float
    ) -> tuple[Float[Tensor, "T n"], Float[Tensor, "K"]]:
        """Row and column terms of log softmax((z·Pᵀ − c) / temp), for `contracts.Targets`."""
        # Cosines are divided by a small temperature: bfloat16 is too coarse.
        with torch.autocast(z.device.type, enabled=False):
            logits = _Logits(z, prototypes, temp)
            col = -self.center.to(logits.rows.dtype) / temp
            row = torch.cat([-part.add_(col[:, None]).logsumexp(0) for part in logits])
            # Logits are linear in z: ranks exchange the sum of z (E numbers) and the row count
            # instead of K logits.
            rows = z.to(logits.rows.dtype).flatten(0, 1)
            total = all_reduce_sum_(torch.cat([rows.sum(0), rows.new_full((1,), len(rows))]))
            mean, count = total[:-1] / total[-1].clamp(min=1), total[-1]
            mean = logits.direction @ mean
            mean = mean if logits.scale is None else logits.scale[:, 0] * mean
            self.batch_center = torch.where(count > 0, mean.to(self.center.dtype), self.center)
        return row.view(z.shape[:2]), col

    @torch.no_grad()
    def after_step(self, ok: Bool[Tensor, ""]) -> None:
        """Update the center with the step's mean, unless the step was skipped."""
        moved = torch.lerp(self.batch_center, self.center, self.momentum)
        self.center.copy_(torch.where(ok, moved, self.center))


class SinkhornKnopp(nn.Module):
    """Assign the rows of all crops and ranks to prototypes in equal shares, each row by a
    distribution (SwAV, arXiv 2006.09882, section 3.1; DINOv2, arXiv 2304.07193, section 4).

    With s = z·Pᵀ/temp and row = 0 initially, repeat `num_iterations` times:
    col_k = −logsumexp_i(s_ik + row_i), then row_i = −logsumexp_k(s_ik + col_k). These are the
    paper's normalizations in log space, so no exponential overflows. The paper's constant factors
    cancel and are omitted: a factor common to all prototypes (K, or the initial total) shifts all
    col_k alike, which the next row_i undoes; one common to all rows (their number) shifts all row_i
    alike, which the next col_k undoes; and the last row_i makes every row sum to one, like the
    paper's final product.

    Stateless: `num_prototypes` is unused, but part of every centering's signature.
    """

    @checked
    def __init__(self, num_prototypes: Count, num_iterations: Size = 3) -> None:
        super().__init__()
        self.num_iterations = num_iterations

    @torch.no_grad()
    def forward(
        self, z: Float[Tensor, "T n E"], prototypes: Prototypes, temp: float
    ) -> tuple[Float[Tensor, "T n"], Float[Tensor, "K"]]:
        """Row and column terms of the balanced distributions, for `contracts.Targets`."""
        with torch.autocast(z.device.type, enabled=False):
            logits = _Logits(z, prototypes, temp)
            parts: Iterable[Tensor] = list(logits) if logits.fit else logits
            row = torch.zeros_like(logits.rows[:, 0])
            col = row.new_zeros(len(logits.direction))
            # Pass i updates rows from the current columns (i > 0), then accumulates the next
            # columns (but in the last pass), so each pass computes the logits once.
            for i in range(self.num_iterations + 1):
                mass = torch.full_like(col, -torch.inf)
                for part, own in zip(parts, torch.split(row, logits.num_rows), strict=True):
                    if i > 0:
                        own.copy_(-(part + col[:, None]).logsumexp(0))
                    if i < self.num_iterations:
                        mass = torch.logaddexp(mass, (part + own).logsumexp(1))
                if i < self.num_iterations:
                    mass = all_reduce_logsumexp(mass)
                    col = torch.where(mass == -torch.inf, 0.0, -mass)  # without any rows: 0
        return row.view(z.shape[:2]), col

    def after_step(self, ok: Bool[Tensor, ""]) -> None:
        """Does nothing: stateless."""


class _Logits:
    """Iterates over z·Pᵀ/temp in at least float32, `num_rows` rows at a time; every iteration
    recomputes them.

    The layout is prototype-major, "K num_rows", for which the matrix product is fastest.
    """

    def __init__(self, z: Float[Tensor, "T n E"], prototypes: Prototypes, temp: float) -> None:
        wide = torch.promote_types(z.dtype, torch.float32)
        length = prototypes.length
        self.direction = prototypes.direction.to(wide)
        self.scale = Prototypes(self.direction, None if length is None else length.to(wide)).scale()
        self.rows = (z.to(wide) / temp).flatten(0, 1)
        held = LOGITS_BYTES.get(z.device.type, LOGITS_BYTES["cuda"])
        self.num_rows = max(1, held // self.direction[:, 0].nbytes)
        self.fit = len(self.rows) <= self.num_rows

    def __iter__(self) -> Iterator[Float[Tensor, "K _"]]:
        for rows in torch.split(self.rows, self.num_rows):
            logits = self.direction @ rows.T
            yield logits if self.scale is None else logits.mul_(self.scale)
