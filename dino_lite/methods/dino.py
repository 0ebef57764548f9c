"""DINO: a student predicts its own running average across crops (Caron et al. 2021)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from dino_lite.contracts import (
    Backbone,
    Crops,
    Match,
    Progress,
    Schedule,
    Scores,
    StepOutputs,
    StepTargets,
    Targets,
    Tokens,
)
from dino_lite.losses.prototype import cross_view_pairs
from dino_lite.methods.method import Method
from dino_lite.nn.centering import EMACentering
from dino_lite.nn.heads import DINOHead
from dino_lite.nn.lora import merged
from dino_lite.nn.teachers import EMATeacher
from dino_lite.settings.kinds import Fraction, Positive, Values


class Student(nn.Module):
    """Backbone and head: crops to bottleneck vectors. The teacher has the same architecture."""

    def __init__(self, backbone: Backbone, head: DINOHead) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, groups: list[Float[Tensor, "_ n C _ _"]]) -> Float[Tensor, "S n E"]:
        """Class tokens through the head: one backbone call per crop size, one head call."""
        cls = [self.backbone(crops.flatten(0, 1), cls_only=True).cls for crops in groups]
        return self.project(cls, groups[0].shape[1])

    def project(self, cls: list[Float[Tensor, "_ D"]], num_images: int) -> Float[Tensor, "S n E"]:
        """Class tokens of all crops, crop-major, through the head."""
        z: Tensor = self.head(torch.cat(cls))  # S*n E
        return z.reshape(-1, num_images, z.shape[-1])


class DINO(Method):
    """Algorithm 1 of arXiv 2104.14294: teacher on global crops, student on all crops.

    `head` builds a projection head for the backbone's width. Provides the matches "embedding",
    "tokens" (of the student's global crops) and, if the head has prototypes, "cls", which is the
    embedding again.
    """

    inherits = ("head", "center_momentum")

    student: Student
    step: Tensor

    def __init__(
        self,
        backbone: Backbone,
        head: Callable[[int], DINOHead],
        momentum: Annotated[Schedule, Values(Fraction)],
        teacher_temp: Annotated[Schedule, Values(Positive)],
        center_momentum: Fraction = 0.9,
    ) -> None:
        super().__init__()
        self.student = Student(backbone, head(backbone.embed_dim))
        self.teachers = nn.ModuleDict({"ema": EMATeacher(self.student, momentum)})
        self.num_prototypes = self.student.head.num_prototypes
        self.provides = ("embedding", "tokens", *(("cls",) if self.num_prototypes else ()))
        self.centering = EMACentering(self.num_prototypes, center_momentum)
        self.teacher_temp = teacher_temp
        self.register_buffer("step", torch.zeros((), dtype=torch.long))

    @property
    def ema(self) -> EMATeacher:
        """The only teacher."""
        return cast(EMATeacher, self.teachers["ema"])

    @torch.no_grad()
    def targets(self, crops: Crops, at: Progress) -> StepTargets:
        """The teacher's centered, sharpened distributions for the global crops; without prototypes,
        its bottleneck vectors only.
        """
        z = self.ema.module([crops.globals_])  # T n E
        targets = centered(
            z,
            self.ema.module.head,
            self.centering,
            self.teacher_temp(at),
            pairs=cross_view_pairs(len(z), len(crops.boxes)),
            weight=torch.full_like(z[0, :, 0], 1.0 / crops.num_images),
        )
        return {"embedding": targets}

    def compare(self, crops: Crops, targets: StepTargets) -> StepOutputs:
        """The student's scores for all crops of a micro-batch, matched with its targets."""
        student, globals_ = self.student, crops.globals_.flatten(0, 1)
        tokens: Tokens = student.backbone(globals_, cls_only=not self.needs_patches)
        cls = [tokens.cls]
        if crops.locals_ is not None:
            cls.append(student.backbone(crops.locals_.flatten(0, 1), cls_only=True).cls)
        z = student.project(cls, crops.num_images)
        target = targets["embedding"]
        match = Match(Scores(z, student.head.prototypes()), target)
        return dict.fromkeys(self.provides, match) | {"tokens": Match(tokens, target)}

    def after_step(self, at: Progress, ok: Bool[Tensor, ""]) -> None:
        """Update teacher and center, and count the step."""
        self.ema.after_step(self.student, at, ok)
        self.centering.after_step(ok)
        self.step += 1

    def schedules(self) -> dict[str, Schedule]:
        """Schedules by the name under which they are logged."""
        temp = {"teacher_temp": self.teacher_temp} if self.num_prototypes else {}
        return {"momentum": self.ema.momentum} | temp

    def export_backbone(self) -> Backbone:
        """The teacher's backbone: it outperforms the student's in training (DINO, figure 6)."""
        return merged(self.ema.module.backbone)


def centered(
    z: Float[Tensor, "T n E"],
    head: DINOHead,
    centering: nn.Module,
    temp: float,
    pairs: Float[Tensor, "T S"],
    weight: Float[Tensor, "n"],
) -> Targets:
    """A teacher's centered, sharpened distributions over the prototypes of `head`; if it has none,
    the bottleneck vectors only.
    """
    prototypes = head.prototypes()
    row, col = torch.zeros_like(z[..., 0]), z.new_zeros(0)
    if head.num_prototypes:
        row, col = centering(z, prototypes, temp)
    return Targets(z, prototypes, row, col, temp, pairs.to(z), weight)
