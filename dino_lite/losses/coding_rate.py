"""SimDINO: crops of an image agree, and the coding rate keeps images apart. No prototypes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any

import torch
from jaxtyping import Float
from torch import Tensor

from dino_lite.contracts import Loss, Match, Schedule, Scores, Targets
from dino_lite.settings.kinds import NonNegative, Positive, whole
from dino_lite.settings.validate import checked


def alignment(z: Float[Tensor, "S n E"], targets: Targets) -> Float[Tensor, ""]:
    """Σ_n weight_n Σ_ts pairs_ts·½‖z_s − z_t‖²: of unit rows 1 − cosine. In at least float32.

    Multiplied out, ½a_s‖z_s‖² + ½Σ_t pairs_ts‖z_t‖² − ⟨z_s, Σ_t pairs_ts·z_t⟩ with
    a_s = Σ_t pairs_ts, so that no "T S n E" is held.
    """
    wide = torch.promote_types(z.dtype, torch.float32)
    ours, theirs = z.to(wide), targets.z.to(wide)
    pairs, weight = targets.pairs.to(theirs), targets.weight.to(theirs)
    with torch.autocast(z.device.type, enabled=False):
        taught = torch.einsum("ts,tne->sne", pairs, theirs)
        apart = 0.5 * torch.einsum("ts,sn->n", pairs, ours.square().sum(-1))
        apart = apart + 0.5 * torch.einsum("ts,tn->n", pairs, theirs.square().sum(-1))
        total: Tensor = (weight * (apart - (ours * taught).sum((0, 2)))).sum()
    return total


def coding_rate(z: Float[Tensor, "*crops n E"], eps: float) -> Float[Tensor, "*crops"]:
    """R_ε = ½·logdet(I + E/(n·ε²)·ZᵀZ) of the n rows of each Z, in nats and at least float32.

    About how many nats the rows take when each is told within a distance of ε; largest where their
    directions are spread evenly (Yu et al. 2020, arXiv 2006.08558, section 2.1). Rows are not
    centered. From the smaller of ZᵀZ and ZZᵀ, whose determinants are the same; not a number where
    that matrix is beyond the precision (ε of 1e-3 and less in float32).
    """
    num, width = z.shape[-2:]
    wide = torch.promote_types(z.dtype, torch.float32)
    with torch.autocast(z.device.type, enabled=False):
        rows = z.to(wide) * (math.sqrt(width / num) / eps)
        gram = rows.mT @ rows if width < num else rows @ rows.mT
        unit = torch.eye(min(num, width), dtype=wide, device=z.device)
        factor, failed = torch.linalg.cholesky_ex(gram + unit)  # asks no device to wait
        half: Tensor = factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    return half.masked_fill(failed > 0, math.nan)


def rate_scale(num: int, width: int, eps: float) -> float:
    """ε·√(n / (E·min(n, E))): the rate times this has a gradient by its n rows of at most ½.

    A singular value σ of Z has the slope aσ/(1 + aσ²) ≤ √a/2 with a = E/(n·ε²), and Z has
    min(n, E) of them.
    """
    return eps * math.sqrt(num / (width * min(num, width)))


class CodingRateLoss(Loss):
    """Adapter: alignment of the Match called `reads`, less `gamma` times the scaled coding rate of
    the student's crops that are the teacher's too.

    A rate is that of one crop of `num_images` images, as they lie in the batch (fewer at its end);
    rates are averaged over crops and, by the images' weights, over groups. So ranks and micro-
    batches change nothing where they hold whole groups. Groups should be smaller than the
    bottleneck is wide: else the rate asks for noise along every axis, and crops no longer agree.
    `gamma=0` is alignment alone: SimDINOv2's masked patches.

    Source: SimDINO (Wu et al. 2025, arXiv 2502.10385): squared distances in place of the
    cross-entropy, and the rate of the class token alone. From its authors' README and answers:
    ε = 0.05 (0.05 to 1 made little difference) and a coefficient of 1, no centering, the rate of
    each GPU's 64 images. Ours, as the paper's text was not at hand: a rate for each global crop,
    and `rate_scale`.
    """

    @checked
    def __init__(
        self,
        reads: str,
        weight: Schedule,
        gamma: NonNegative = 1.0,
        eps: Positive = 0.05,
        num_images: Annotated[int, whole(2)] = 64,  # one image alone has no rate
    ) -> None:
        self.reads, self.weight = reads, weight
        self.gamma, self.eps, self.num_images = gamma, eps, num_images

    @staticmethod
    def mixes_images(settings: Mapping[str, Any]) -> bool:
        """Whether micro-batches change the result: alignment alone is a sum over images."""
        return bool(settings["gamma"] != 0)

    def __call__(self, match: Match) -> Float[Tensor, ""]:
        scores, targets = match.student, match.target
        if not isinstance(scores, Scores) or not isinstance(targets, Targets):
            raise TypeError(f"{self.reads}: a coding rate loss compares Scores with Targets")
        total = alignment(scores.z, targets)
        if not self.gamma:
            return total
        for start in range(0, scores.z.shape[1], self.num_images):
            group = slice(start, start + self.num_images)
            z = scores.z[: len(targets.z), group]
            scale = self.gamma * rate_scale(z.shape[1], z.shape[2], self.eps)
            share = targets.weight[group].to(total).sum()
            total = total - scale * share * coding_rate(z, self.eps).mean()
        return total
