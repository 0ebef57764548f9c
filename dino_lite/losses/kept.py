"""Retention of tokens: keeps class and patch tokens close to those of a frozen network."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from dino_lite.contracts import Kept, Loss, Match, MatchError, Schedule, Tokens, UserError
from dino_lite.settings.kinds import NonNegative
from dino_lite.settings.validate import checked


def kept_distance(
    student: Float[Tensor, "*n D"], frozen: Float[Tensor, "*n D"]
) -> Float[Tensor, "*n"]:
    """‖s−t‖²/‖t‖² + 1 − cos(s, t) of each pair of tokens: squared error and cosine distance in
    equal parts, as NVIDIA TAO's adaptation of DINOv3 has them for class tokens, but independent of
    the scale of the features.

    1 − cos is computed as half the squared distance of the unit vectors, so that equal tokens have
    a distance of exactly zero. Computed in at least float32; `frozen` receives no gradient.
    """
    wide = torch.promote_types(student.dtype, torch.float32)
    with torch.autocast(student.device.type, enabled=False):
        s, t = student.to(wide), frozen.detach().to(wide)
        norm = t.square().sum(-1).clamp(min=torch.finfo(wide).tiny)
        turned = (F.normalize(s, dim=-1) - F.normalize(t, dim=-1)).square().sum(-1) / 2
        return (s - t).square().sum(-1) / norm + turned


class KeptLoss(Loss):
    """Adapter: `kept_distance` of class tokens, plus `patches` times its mean over patches;
    averaged over global crops and, by their weights, over images.
    """

    @checked
    def __init__(self, reads: str, weight: Schedule, patches: NonNegative = 1.0) -> None:
        self.reads, self.weight, self.patches = reads, weight, patches
        self.cls_only = not patches  # type: ignore[misc]  # here it follows from a setting

    def __call__(self, match: Match) -> Float[Tensor, ""]:
        student, kept = match.student, match.target
        if not isinstance(student, Tokens) or not isinstance(kept, Kept):
            raise MatchError(f"{self.reads}: retention compares Tokens with Kept")
        if student.cls.shape[-1] != kept.cls.shape[-1]:
            raise UserError(
                f"loss: features of {kept.cls.shape[-1]} numbers cannot be kept by a backbone of "
                f"{student.cls.shape[-1]}: replace kept by kept_gram, which compares networks of "
                "any width."
            )
        distance = kept_distance(student.cls.view(kept.cls.shape), kept.cls)  # G n
        if self.patches:
            mine = student.patches.reshape(kept.patches.shape)
            distance = distance + self.patches * kept_distance(mine, kept.patches).mean(-1)
        by_image = distance.mean(0)
        loss: Tensor = (kept.weight.to(by_image) * by_image).sum()
        return loss
