"""The interface between a training method and the optimizer step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from jaxtyping import Bool
from torch import Tensor, nn

from dino_lite.contracts import (
    Backbone,
    Crops,
    Progress,
    Schedule,
    StepOutputs,
    StepTargets,
    UserError,
)


class Method(nn.Module):
    """A training method: student, teachers, targets, and updates after a step. Abstract;
    independent of Lightning and of the training loop.

    `teachers` maps roles ("ema") to teachers; `step` counts optimizer steps.
    """

    inherits: ClassVar[tuple[str, ...]] = ()  # settings that a start from an earlier run takes over
    not_inherited: ClassVar[tuple[str, ...]] = (
        "step",
    )  # prefixes of weights that it does not load

    provides: tuple[str, ...]  # names of the matches that losses may read
    notes: tuple[str, ...] = ()  # on the weights with which a run begins, one clause each
    needs_patches = False  # set by Step: a loss reads patches of the match "tokens"
    masks_crops = False  # whether the student's global crops may be masked
    student: nn.Module
    teachers: nn.ModuleDict
    step: Tensor

    def targets(self, crops: Crops, at: Progress) -> StepTargets:
        """The student's targets for the whole batch, without gradient."""
        raise NotImplementedError

    def compare(self, crops: Crops, targets: StepTargets) -> StepOutputs:
        """The student's outputs for a micro-batch, matched with the targets of the same images."""
        raise NotImplementedError

    def after_step(self, at: Progress, ok: Bool[Tensor, ""]) -> None:
        """Update teachers and centers, unless `ok` is false (a skipped step); count the step."""
        raise NotImplementedError

    @classmethod
    def requires_weights(cls, settings: Mapping[str, Any]) -> str | None:
        """Why a run with these settings cannot start from random weights; None if it can."""
        return None

    def begin(self, weights: Mapping[str, Tensor]) -> None:
        """Load the state dict of an earlier run of this method; the step count starts at 0.

        Raises UserError if a weight is missing, unknown or of another shape.
        """
        own = {n: v for n, v in self.state_dict().items() if not n.startswith(self.not_inherited)}
        weights = {n: v for n, v in weights.items() if not n.startswith(self.not_inherited)}
        wrong = [n for n in own if n not in weights or own[n].shape != weights[n].shape]
        wrong += sorted(weights.keys() - own.keys())
        if wrong:
            raise UserError(
                f"{wrong[0]} is the first weight that differs; remove settings that change "
                "backbone or heads."
            )
        self.load_state_dict(weights, strict=False)

    def schedules(self) -> dict[str, Schedule]:
        """Schedules by the name under which they are logged."""
        raise NotImplementedError

    def export_backbone(self) -> Backbone:
        """The backbone that is evaluated and exported: the teacher's, its adapters merged. With
        several students, the first one's.
        """
        raise NotImplementedError

    def export_backbones(self) -> dict[str, Backbone]:
        """The backbone of each student by its name; "" for the only student."""
        return {"": self.export_backbone()}
