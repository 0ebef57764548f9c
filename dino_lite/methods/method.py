"""What every way to learn offers the step."""

from __future__ import annotations

from jaxtyping import Bool
from torch import Tensor, nn

from dino_lite.contracts import Backbone, Crops, Progress, Schedule, StepOutputs, StepTargets


class Method(nn.Module):
    """A way to learn: who the student is, what it is held against, and what follows a step. No
    Lightning, no loop.

    Abstract. `teachers` maps roles ("ema") to Teachers; `step` counts optimizer steps.
    """

    provides: tuple[str, ...]
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

    def begin(self) -> None:
        """The weights of an earlier run have been loaded: what copies others at the start of a run
        does so again.
        """

    def schedules(self) -> dict[str, Schedule]:
        """What moves with the run, by the name it is logged under."""
        raise NotImplementedError

    def export_backbone(self) -> Backbone:
        """The backbone that is evaluated and exported: the teacher's."""
        raise NotImplementedError
