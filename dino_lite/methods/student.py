"""A student of a distillation: its backbone and heads, and what it is compared with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from dino_lite.contracts import Backbone, Crops, Match, Scores, StepOutputs, Targets, Tokens
from dino_lite.losses.gram import regrid
from dino_lite.losses.similarity import Queued
from dino_lite.losses.tokens import Rows
from dino_lite.nn.masks import Masks

# Matches by what they read: masked patches, any patches, class tokens, and crops without masks.
OF_MASKED = frozenset({"patch", "masked_tokens"})
OF_PATCHES = frozenset({"patch", "masked_tokens", "patch_tokens", "patch_similarity"})
OF_CLS = frozenset({"cls_token", "cls_similarity"})
OF_WHOLE = frozenset({"cls_token", "cls_similarity", "patch_tokens", "patch_similarity"})


class Taught(NamedTuple):
    """The teacher's tokens of the crops, patches on its own grid, the weight of each image, and the
    queue of its unit class tokens, of which the first `filled` are.
    """

    cls: Float[Tensor, "S n D"]  # of local crops as well if a loss compares them
    patches: Float[Tensor, "G n P D"]
    grid: tuple[int, int]
    weight: Float[Tensor, "n"]
    queue: Float[Tensor, "Q D"]
    filled: Int[Tensor, ""]
    resampled: dict[tuple[int, int], Tensor]  # its patches by grid, as far as they were asked for

    def part(self, start: int, stop: int) -> Taught:
        """Images start to stop (exclusive), their weights as in the whole batch."""
        cut = slice(start, stop)
        cls, patches, weight = self.cls[:, cut], self.patches[:, cut], self.weight[cut]
        return self._replace(cls=cls, patches=patches, weight=weight, resampled={})

    def cls_rows(self) -> Rows:
        """Class tokens, crop-major."""
        num = len(self.cls)
        return Rows(self.cls.flatten(0, 1), self.weight.repeat(num) / num)

    def patch_rows(self, grid: tuple[int, int]) -> Rows:
        """The patches of each crop on a student's grid, crop-major."""
        if grid not in self.resampled:
            self.resampled[grid] = regrid(self.patches.flatten(0, 1), self.grid, grid)
        num = len(self.patches)
        return Rows(self.resampled[grid], self.weight.repeat(num) / num)


class Masked(NamedTuple):
    """The masks of a student's crops and, with prototypes, the targets of the masked patches."""

    masks: Masks
    targets: Targets | None

    def part(self, start: int, stop: int) -> Masked:
        """Images start to stop (exclusive)."""
        first, last = self.masks.bounds[start], self.masks.bounds[stop]
        targets = None if self.targets is None else self.targets.part(first, last)
        return Masked(self.masks.part(start, stop), targets)


class Student(nn.Module):
    """A backbone, and a head for each match that a loss reads."""

    def __init__(self, backbone: Backbone, heads: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.backbone, self.heads = backbone, nn.ModuleDict(dict(heads))

    def compare(
        self,
        crops: Crops,
        taught: Taught,
        prototypes: Targets,
        masked: Masked | None,
        reads: frozenset[str],
    ) -> StepOutputs:
        """The matches in `reads`: crops pass as they are and, if any are masked, once more. Scores
        of class tokens are those of masked crops, as in DINOv2.
        """
        backbone, globals_ = self.backbone, crops.globals_.flatten(0, 1)
        found, locals_ = StepOutputs(), []
        if crops.locals_ is not None and reads & (OF_CLS | {"cls"}):
            locals_ = [backbone(crops.locals_.flatten(0, 1), cls_only=True).cls]
        if masked is None or reads & OF_WHOLE:
            tokens = backbone(globals_, cls_only=not reads & {"patch_tokens", "patch_similarity"})
            found |= self._of_whole(tokens, torch.cat([tokens.cls, *locals_]), taught, reads)
        if masked is not None:
            tokens = backbone(globals_, mask=masked.masks.mask.flatten(0, 1))
            found |= self._of_masked(tokens, taught, masked, reads)
        if "tokens" in reads:
            found["tokens"] = Match(tokens, prototypes)
        if "cls" in reads:
            scores = self._scores("cls", torch.cat([tokens.cls, *locals_]), crops.num_images)
            found["cls"] = Match(scores, prototypes)
        return found

    def _of_whole(
        self, tokens: Tokens, cls: Float[Tensor, "r D"], taught: Taught, reads: frozenset[str]
    ) -> StepOutputs:
        """The matches of crops that are not masked; `cls` are the class tokens of all crops."""
        found = StepOutputs()
        for match in sorted(reads & OF_WHOLE):
            rows = taught.cls_rows() if match in OF_CLS else taught.patch_rows(tokens.grid)
            ours = self.heads[match](cls if match in OF_CLS else tokens.patches)
            beside = Queued(rows, taught.queue, taught.filled)
            found[match] = Match(ours, beside if match == "cls_similarity" else rows)
        return found

    def _of_masked(
        self, tokens: Tokens, taught: Taught, masked: Masked, reads: frozenset[str]
    ) -> StepOutputs:
        """The matches of masked patches."""
        found, rows = StepOutputs(), masked.masks.select(tokens.patches)  # M D
        if masked.targets is not None:
            found["patch"] = Match(self._scores("patch", rows, len(rows)), masked.targets)
        if "masked_tokens" in reads:
            values = masked.masks.select(taught.patch_rows(tokens.grid).values)
            target = Rows(values, masked.masks.weight)
            found["masked_tokens"] = Match(self.heads["masked_tokens"](rows), target)
        return found

    def _scores(self, match: str, rows: Float[Tensor, "r D"], num: int) -> Scores:
        """Scores of rows, `num` of each crop."""
        head: Any = self.heads[match]
        z: Tensor = head(rows)
        return Scores(z.reshape(len(z) // num if num else 1, num, z.shape[-1]), head.prototypes())


def mixed(crops: Crops, share: float) -> Crops:
    """λ·x + (1−λ)·y for each image x of the batch and its neighbor y, λ = `share`: images 2k and
    2k+1 are neighbors, so the pairs do not depend on the number of processes.
    """

    def mix(images: Tensor) -> Tensor:
        number = torch.arange(images.shape[1], device=images.device)
        neighbor = (number ^ 1).clamp(max=images.shape[1] - 1)
        return torch.lerp(images[:, neighbor], images, share)

    return crops._replace(
        globals_=mix(crops.globals_),
        locals_=None if crops.locals_ is None else mix(crops.locals_),
        extra={name: mix(images) for name, images in crops.extra.items()},
    )
