"""Regression of a teacher's tokens: Proteus (Zhang et al. 2025, arXiv 2409.10366, section 3)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from dino_lite.contracts import Loss, Match, MatchError, Schedule


class Rows(NamedTuple):
    """A teacher's tokens, one row (or matrix) per crop or patch, and the weight of each row."""

    values: Float[Tensor, "r *more D"]
    weight: Float[Tensor, "r"]


def token_distance(student: Float[Tensor, "r *more D"], target: Rows) -> Float[Tensor, ""]:
    """Σ_r weight_r · mean of the squared differences of row r, in at least float32."""
    wide = torch.promote_types(student.dtype, torch.float32)
    with torch.autocast(student.device.type, enabled=False):
        squares = (student.to(wide) - target.values.to(wide)).square().flatten(1).mean(1)
        return (target.weight.to(wide) * squares).sum()


class TokenLoss(Loss):
    """Adapter: `token_distance` of the match `reads`, class tokens, patches or masked patches."""

    def __init__(self, reads: str, weight: Schedule) -> None:
        self.reads, self.weight = reads, weight

    def __call__(self, match: Match) -> Float[Tensor, ""]:
        if not isinstance(match.student, Tensor) or not isinstance(match.target, Rows):
            raise MatchError(f"{self.reads}: this loss compares a student's tokens with Rows")
        return token_distance(match.student, match.target)
