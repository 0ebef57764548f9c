"""Cross-entropy between distributions over prototypes: DINO's loss, and the one kernel of those
that resemble it.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from dino_lite.contracts import Match, Schedule, Scores, Targets, UserError


def prototype_cross_entropy(
    scores: Scores, targets: Targets, temp: float, chunk: int = 0
) -> Float[Tensor, ""]:
    """Σ_n weight_n Σ_s [(Σ_t pairs_ts)·logsumexp_s − ⟨Σ_t pairs_ts·q_t, s⟩], s = z·Pᵀ/temp (DINO,
    eq. 1 to 3).

    Equals the sum over all pairs (t, s) of pairs_ts·H(q_t, softmax(s)), because every q_t sums to
    one: one logsumexp a student crop instead of one log-softmax a pair, and a teacher distribution
    is made once a chunk of `chunk` images (0: all at once). Computed in at least float32.
    """
    num_images = scores.z.shape[1]
    chunk = chunk or num_images
    parts = [
        _cross_entropy(
            Scores(scores.z[:, i : i + chunk], scores.prototypes), targets.part(i, i + chunk), temp
        )
        for i in range(0, num_images, chunk)
    ]
    return torch.stack(parts).sum()


def _cross_entropy(scores: Scores, targets: Targets, temp: float) -> Float[Tensor, ""]:
    wide = torch.promote_types(scores.z.dtype, torch.float32)
    with torch.no_grad():
        logits = (_logits(crop, targets.prototypes) / targets.temp for crop in targets.z)
        q = torch.stack(
            [
                (s + row[:, None] + targets.col).exp()
                for s, row in zip(logits, targets.row, strict=True)
            ]
        )
    weight = targets.weight.to(wide)
    total = weight.new_zeros(())
    for s, z in enumerate(scores.z):
        pairs = targets.pairs[:, s].tolist()
        mixed = torch.zeros_like(q[0])
        for t, pair in enumerate(pairs):
            if pair:
                mixed.add_(q[t], alpha=pair)
        logits_s = _logits(z, scores.prototypes) / temp
        cross = sum(pairs) * logits_s.logsumexp(-1) - (mixed * logits_s).sum(-1)
        total = total + (weight * cross).sum()  # no product of matrices: autocast would halve it
    return total


def _logits(z: Float[Tensor, "n E"], prototypes: Float[Tensor, "K E"]) -> Float[Tensor, "n K"]:
    """z·Pᵀ without autocast: bfloat16's 2⁻⁹ of a cosine is 0.05 after a temperature of 0.04."""
    with torch.autocast(z.device.type, enabled=False):
        return z @ prototypes.T


def cross_view_pairs(num_teacher: int, num_student: int) -> Float[Tensor, "T S"]:
    """Weights of the mean over all pairs of a teacher crop and a different student crop (DINO,
    Algorithm 1).
    """
    pairs = torch.ones(num_teacher, num_student, dtype=torch.float64)
    pairs.fill_diagonal_(0.0)
    return pairs / pairs.sum()


class PrototypeLoss:
    """Adapter: cross-entropy of the Match called `reads`, student sharpened by `student_temp`."""

    def __init__(
        self, reads: str, weight: Schedule, student_temp: float = 0.1, chunk: int = 0
    ) -> None:
        if student_temp <= 0:
            raise UserError(
                f"loss student_temp={student_temp}: a temperature is positive (0.1 in the paper)."
            )
        self.reads, self.weight, self.student_temp, self.chunk = reads, weight, student_temp, chunk

    def __call__(self, match: Match) -> Float[Tensor, ""]:
        if not isinstance(match.student, Scores) or not isinstance(match.target, Targets):
            raise TypeError(f"{self.reads}: a prototype loss compares Scores with Targets")
        return prototype_cross_entropy(match.student, match.target, self.student_temp, self.chunk)
