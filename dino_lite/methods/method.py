"""What every way to learn offers the step."""

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
    """A way to learn: who the student is, what it is held against, and what follows a step. No
    Lightning, no loop.

    Abstract. `teachers` maps roles ("ema") to Teachers; `step` counts optimizer steps.
    """

    inherits: ClassVar[tuple[str, ...]] = ()  # settings that the weights of an earlier run fix
    not_inherited: ClassVar[tuple[str, ...]] = ("step",)  # prefixes of weights that start anew

    provides: tuple[str, ...]
    needs_patches = False  # a loss reads patches of the match "tokens": set by Step
    student: nn.Module
    teachers: nn.ModuleDict
    step: Tensor

    def targets(self, crops: Crops, at: Progress) -> StepTargets:
        """What the student shall match, for the whole batch and without gradient."""
        raise NotImplementedError

    def compare(self, crops: Crops, targets: StepTargets) -> StepOutputs:
        """The student's answer to a micro-batch beside the targets of the same images."""
        raise NotImplementedError

    def after_step(self, at: Progress, ok: Bool[Tensor, ""]) -> None:
        """Move teachers and centers; where `ok` is false (a skipped step) nothing may change."""
        raise NotImplementedError

    @classmethod
    def requires_weights(cls, settings: Mapping[str, Any]) -> str | None:
        """Why a run with these settings cannot start from fresh weights; None where it can."""
        return None

    def begin(self, weights: Mapping[str, Tensor]) -> None:
        """Start from the state dict of an earlier run of this method; the step count starts at 0.

        Raises UserError where a weight is missing, unknown or of another shape.
        """
        own = {n: v for n, v in self.state_dict().items() if not n.startswith(self.not_inherited)}
        weights = {n: v for n, v in weights.items() if not n.startswith(self.not_inherited)}
        wrong = [n for n in own if n not in weights or own[n].shape != weights[n].shape]
        wrong += sorted(weights.keys() - own.keys())
        if wrong:
            raise UserError(
                f"{wrong[0]} is the first weight that differs; leave out what changes backbone or "
                "heads."
            )
        self.load_state_dict(weights, strict=False)

    def schedules(self) -> dict[str, Schedule]:
        """What moves with the run, by the name it is logged under."""
        raise NotImplementedError

    def export_backbone(self) -> Backbone:
        """The backbone that is evaluated and exported: the teacher's."""
        raise NotImplementedError
