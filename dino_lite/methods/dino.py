"""DINO: a student matches its own running average across crops (Caron et al. 2021, arXiv 2104.14294)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from dino_lite.contracts import (
    Crops,
    Match,
    Method,
    Progress,
    Schedule,
    Scores,
    StepOutputs,
    StepTargets,
    Targets,
)
from dino_lite.losses.prototype import cross_view_pairs
from dino_lite.nn.centering import EMACentering
from dino_lite.nn.teachers import EMATeacher


class DINO(Method):
    """Algorithm 1 of the paper: teacher on the global crops, student on all, cross-entropy over prototypes.

    `head` makes a projection head from the backbone's width. Provides the match "cls".
    """

    provides = ("cls",)
    step: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        head: Callable[[int], nn.Module],
        momentum: Schedule,
        teacher_temp: Schedule,
        center_momentum: float = 0.9,
    ) -> None:
        super().__init__()
        self.student = nn.ModuleDict({"backbone": backbone, "head": head(backbone.embed_dim)})  # type: ignore[arg-type]
        self.teachers = nn.ModuleDict({"ema": EMATeacher(self.student, momentum)})
        num_prototypes = self.student["head"].last_layer.weight_v.shape[0]
        self.centering = EMACentering(num_prototypes, center_momentum)
        self.teacher_temp = teacher_temp
        self.register_buffer("step", torch.zeros((), dtype=torch.long))

    @torch.no_grad()
    def targets(self, crops: Crops, at: Progress) -> StepTargets:
        """The teacher's sharpened, centered distributions over the global crops of the whole batch."""
        teacher = self.teachers["ema"].module
        z = project(teacher, [crops.globals_])  # T n E
        prototypes = teacher["head"].prototypes()
        temp = self.teacher_temp(at)
        row, col = self.centering(z, prototypes, temp)
        num_student = len(crops.boxes)
        return {
            "cls": Targets(
                z=z,
                prototypes=prototypes,
                row=row,
                col=col,
                temp=temp,
                pairs=cross_view_pairs(len(z), num_student),
                weight=torch.full_like(row[0], 1.0 / crops.num_images),
            )
        }

    def compare(self, crops: Crops, targets: StepTargets) -> StepOutputs:
        """The student's scores for all crops of a micro-batch, beside its targets."""
        groups = [crops.globals_] + ([] if crops.locals_ is None else [crops.locals_])
        z = project(self.student, groups)  # S n E
        scores = Scores(z=z, prototypes=self.student["head"].prototypes())
        return {"cls": Match(student=scores, target=targets["cls"])}

    def after_step(self, at: Progress, ok: Bool[Tensor, ""]) -> None:
        """Teacher and center follow, and the step is counted."""
        self.teachers["ema"].after_step(self.student, at, ok)
        self.centering.after_step(ok)
        self.step += 1

    def schedules(self) -> dict[str, Schedule]:
        """What moves with the run, by the name it is logged under."""
        return {"momentum": self.teachers["ema"].momentum, "teacher_temp": self.teacher_temp}

    def export_backbone(self) -> nn.Module:
        """The teacher's backbone: it is the better one throughout training (DINO, figure 6)."""
        return self.teachers["ema"].module["backbone"]


def project(network: nn.ModuleDict, groups: list[Float[Tensor, "S n C H W"]]) -> Float[Tensor, "S n E"]:
    """Class features of crops through backbone and head: one backbone call a crop size, one head call in all."""
    cls = [network["backbone"](crops.flatten(0, 1)).cls for crops in groups]
    num_images = groups[0].shape[1]
    return network["head"](torch.cat(cls)).unflatten(0, (-1, num_images))
