"""Gram anchoring: keeps the similarities between patches close to those of an earlier network,
while the features themselves may change (DINOv3, arXiv 2508.10104, section 4.2).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dino_lite.contracts import Anchor, Loss, Match, MatchError, Schedule, Tokens

MATRIX_BYTES = 64 * 2**20  # limit of the similarity matrices held at once


def gram_distance(
    student: Float[Tensor, "n P D"], anchor: Float[Tensor, "n P A"], remove_negative: bool = False
) -> Float[Tensor, "n"]:
    """Mean squared difference of the cosine similarities of all pairs of patches, per image.

    Computed in at least float32; widths D and A may differ. With `remove_negative`, negative
    cosines of both are set to 0. `anchor` receives no gradient.
    """
    num, size = student.shape[:2]
    at_once = max(1, MATRIX_BYTES // (4 * size**2))
    if num > at_once:  # matrices of a few images at a time, recomputed in the backward pass
        parts = zip(torch.split(student, at_once), torch.split(anchor, at_once), strict=True)
        kept = [checkpoint(gram_distance, *p, remove_negative, use_reentrant=False) for p in parts]
        return torch.cat(kept)
    wide = torch.promote_types(student.dtype, torch.float32)
    with torch.autocast(student.device.type, enabled=False):
        ours, theirs = (
            x @ x.mT for x in (F.normalize(y.to(wide), dim=-1) for y in (student, anchor.detach()))
        )
        if remove_negative:
            ours, theirs = ours.clamp(min=0), theirs.clamp(min=0)
        return (ours - theirs).square().mean((1, 2))


@torch.no_grad()
def regrid(
    patches: Float[Tensor, "n P D"], grid: tuple[int, int], wanted: tuple[int, int]
) -> Float[Tensor, "n Q D"]:
    """Resample patches (not normalized) from `grid` to `wanted`: antialiased bicubic, in at least
    float32.
    """
    if grid == wanted:
        return patches
    wide = torch.promote_types(patches.dtype, torch.float32)
    cells = patches.to(wide).mT.reshape(*patches.mT.shape[:2], *grid)  # n D rows columns
    cells = F.interpolate(cells, size=wanted, mode="bicubic", antialias=True)
    return cells.flatten(2).mT


class GramLoss(Loss):
    """Adapter: `gram_distance` averaged over global crops and, by their weights, over images.

    This is the variant that the reference's recipes use: one matrix per image (`img_level`), of
    unit rows (`normalized`), over all tokens.
    """

    def __init__(self, reads: str, weight: Schedule, remove_negative: bool = False) -> None:
        self.reads, self.weight, self.remove_negative = reads, weight, remove_negative

    def __call__(self, match: Match) -> Float[Tensor, ""]:
        student, anchor = match.student, match.target
        if not isinstance(student, Tokens) or not isinstance(anchor, Anchor):
            raise MatchError(f"{self.reads}: Gram anchoring compares Tokens with an Anchor")
        theirs = anchor.patches.flatten(0, 1)
        distance = gram_distance(student.patches, theirs, self.remove_negative)
        by_image = distance.view(anchor.patches.shape[:2]).mean(0)
        loss: Tensor = (anchor.weight.to(by_image) * by_image).sum()
        return loss
