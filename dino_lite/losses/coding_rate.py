"""SimDINO: alignment of an image's crops, and a coding rate that spreads images. No prototypes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any

import torch
from jaxtyping import Float
from torch import Tensor

from dino_lite.contracts import Loss, Match, MatchError, Schedule, Scores, Targets
from dino_lite.settings.kinds import NonNegative, Positive, whole
from dino_lite.settings.validate import checked


def alignment(z: Float[Tensor, "S n E"], targets: Targets) -> Float[Tensor, ""]:
    """Σ_n weight_n Σ_ts pairs_ts·½‖z_s − z_t‖², where ½‖z_s − z_t‖² of unit rows is 1 − cosine.
    Computed in at least float32.

    Expanded to ½a_s‖z_s‖² + ½Σ_t pairs_ts‖z_t‖² − ⟨z_s, Σ_t pairs_ts·z_t⟩ with a_s = Σ_t pairs_ts,
    which avoids a "T S n E" tensor.
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
    """R_ε = ½·logdet(I + E/(n·ε²)·ZᵀZ) of the n rows of each Z, in nats, in at least float32.

    Approximates the nats needed to encode the rows up to an error of ε; largest if their directions
    are spread evenly (Yu et al. 2020, arXiv 2006.08558, section 2.1). Rows are not centered.
    Computed from the smaller of ZᵀZ and ZZᵀ, which give the same determinant; NaN if that matrix is
    too ill-conditioned for the precision (ε ≤ 1e-3 in float32).
    """
    num, width = z.shape[-2:]
    wide = torch.promote_types(z.dtype, torch.float32)
    with torch.autocast(z.device.type, enabled=False):
        rows = z.to(wide) * (math.sqrt(width / num) / eps)
        gram = rows.mT @ rows if width < num else rows @ rows.mT
        unit = torch.eye(min(num, width), dtype=wide, device=z.device)
        factor, failed = torch.linalg.cholesky_ex(gram + unit)  # does not synchronize
        half: Tensor = factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    return half.masked_fill(failed > 0, math.nan)


def rate_scale(num: int, width: int, eps: float) -> float:
    """ε·√(n / (E·min(n, E))): scaled by this, the rate of n rows has a gradient norm of at most ½.

    The derivative by a singular value σ of Z is aσ/(1 + aσ²) ≤ √a/2 with a = E/(n·ε²), and Z has
    min(n, E) singular values.
    """
    return eps * math.sqrt(num / (width * min(num, width)))


class CodingRateLoss(Loss):
    """Adapter: alignment of the Match named `reads`, minus `gamma` times the scaled coding rate of
    the student's global crops.

    A rate is computed for each crop of each group of `num_images` consecutive images (the last
    group may be smaller); rates are averaged over crops and, by the images' weights, over groups.
    Hence ranks and micro-batches do not affect the result if they contain whole groups. Groups
    should be smaller than the bottleneck width: otherwise the rate favors noise along every axis at
    the expense of alignment. `gamma=0` is alignment only, as for SimDINOv2's masked patches.

    Source: SimDINO (Wu et al. 2025, arXiv 2502.10385): squared distances instead of the
    cross-entropy, and the coding rate of class tokens only. From its authors' README and answers:
    ε = 0.05 (0.05 to 1 made little difference), a coefficient of 1, no centering, the rate of each
    GPU's 64 images. Ours, as the paper's text was not available: a rate per global crop, and
    `rate_scale`.
    """

    @checked
    def __init__(
        self,
        reads: str,
        weight: Schedule,
        gamma: NonNegative = 1.0,
        eps: Positive = 0.05,
        num_images: Annotated[int, whole(2)] = 64,  # a single image has no meaningful rate
    ) -> None:
        self.reads, self.weight = reads, weight
        self.gamma, self.eps, self.num_images = gamma, eps, num_images

    @staticmethod
    def mixes_images(settings: Mapping[str, Any]) -> bool:
        """True with the coding rate; alignment alone is a sum over images."""
        return bool(settings["gamma"] != 0)

    def __call__(self, match: Match) -> Float[Tensor, ""]:
        scores, targets = match.student, match.target
        if not isinstance(scores, Scores) or not isinstance(targets, Targets):
            raise MatchError(f"{self.reads}: a coding rate loss compares Scores with Targets")
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
