"""Distillation of similarities: to a queue of other images, and among the patches of an image."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from dino_lite.contracts import Loss, Match, MatchError, Schedule
from dino_lite.losses.tokens import Rows
from dino_lite.settings.kinds import Positive
from dino_lite.settings.validate import checked


class Queued(NamedTuple):
    """A teacher's class tokens, and its unit class tokens of recent images: the first `filled`
    rows of `queue`.
    """

    rows: Rows
    queue: Float[Tensor, "Q D"]
    filled: Int[Tensor, ""]


def queue_divergence(
    student: Float[Tensor, "r D"], target: Queued, temp: float
) -> Float[Tensor, ""]:
    """Σ_r weight_r · KL(p_r ‖ q_r), p and q the teacher's and the student's softmax over the
    cosines with the queue, divided by `temp` (SEED: Fang et al. 2021, arXiv 2101.04731, eq. 3 to 5;
    one temperature for both).
    """
    wide = torch.promote_types(student.dtype, torch.float32)
    with torch.autocast(student.device.type, enabled=False):
        empty = torch.arange(len(target.queue), device=student.device) >= target.filled
        queue = target.queue.to(wide)
        ours, theirs = (
            (F.normalize(rows.to(wide), dim=-1) @ queue.T / temp).masked_fill(empty, -torch.inf)
            for rows in (student, target.rows.values)
        )
        return (target.rows.weight.to(wide) * _divergence(theirs, ours)).sum()


def patch_divergence(
    student: Float[Tensor, "r P D"], target: Rows, temp: float
) -> Float[Tensor, ""]:
    """Σ_r weight_r · mean over patches i of KL(p_i ‖ q_i), p_i and q_i the teacher's and the
    student's softmax over the cosines of patch i with all patches of its crop, divided by `temp`
    (`queue_divergence`, with the crop's own patches as the queue).
    """
    wide = torch.promote_types(student.dtype, torch.float32)
    with torch.autocast(student.device.type, enabled=False):
        units = (F.normalize(rows.to(wide), dim=-1) for rows in (student, target.values))
        ours, theirs = (x @ x.mT / temp for x in units)  # r P P
        return (target.weight.to(wide) * _divergence(theirs, ours).mean(1)).sum()


def _divergence(theirs: Float[Tensor, "*r Q"], ours: Float[Tensor, "*r Q"]) -> Float[Tensor, "*r"]:
    """KL(softmax(theirs) ‖ softmax(ours)) of each row; entries of −inf in both count as 0."""
    p, q = theirs.log_softmax(-1), ours.log_softmax(-1)
    differences = torch.where(p == -torch.inf, 0.0, p - torch.where(q == -torch.inf, 0.0, q))
    return (p.exp() * differences).sum(-1)


class QueueLoss(Loss):
    """Adapter: `queue_divergence` of the match `reads`."""

    @checked
    def __init__(self, reads: str, weight: Schedule, temp: Positive = 0.07) -> None:
        self.reads, self.weight, self.temp = reads, weight, temp

    def __call__(self, match: Match) -> Float[Tensor, ""]:
        if not isinstance(match.student, Tensor) or not isinstance(match.target, Queued):
            raise MatchError(f"{self.reads}: this loss compares class tokens with Queued")
        return queue_divergence(match.student, match.target, self.temp)


class PatchSimilarityLoss(Loss):
    """Adapter: `patch_divergence` of the match `reads`."""

    @checked
    def __init__(self, reads: str, weight: Schedule, temp: Positive = 0.07) -> None:
        self.reads, self.weight, self.temp = reads, weight, temp

    def __call__(self, match: Match) -> Float[Tensor, ""]:
        if not isinstance(match.student, Tensor) or not isinstance(match.target, Rows):
            raise MatchError(f"{self.reads}: this loss compares a student's patches with Rows")
        return patch_divergence(match.student, match.target, self.temp)
