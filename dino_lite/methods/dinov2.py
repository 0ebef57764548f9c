"""DINOv2: DINO on class tokens, iBOT on masked patches, KoLeo regularization (Oquab et al. 2023);
with Gram anchoring, DINOv3's objective (Siméoni et al. 2025).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, NamedTuple, cast

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from dino_lite.contracts import (
    Anchor,
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
    UserError,
)
from dino_lite.losses.gram import regrid
from dino_lite.losses.prototype import cross_view_pairs
from dino_lite.methods.dino import centered
from dino_lite.methods.method import Method
from dino_lite.methods.snapshot import SnapshotTeacher
from dino_lite.nn.heads import DINOHead
from dino_lite.nn.masking import BlockMasking
from dino_lite.nn.masks import Masks, draw_masks
from dino_lite.nn.teachers import EMATeacher
from dino_lite.settings.kinds import Fraction, Positive, Values


class Student(nn.Module):
    """Backbone, head for class tokens, and head for patches (None: `head` is shared)."""

    def __init__(self, backbone: Backbone, head: DINOHead, patch_head: DINOHead | None) -> None:
        super().__init__()
        self.backbone, self.head, self.patch_head = backbone, head, patch_head

    @property
    def of_patches(self) -> DINOHead:
        """The head for patches."""
        return self.head if self.patch_head is None else self.patch_head


class Masked(NamedTuple):
    """A batch's masks, and the targets of its masked patches: one row each, image by image."""

    masks: Masks
    targets: Targets  # T = 1 and n = M: every masked patch of every crop is a row

    def part(self, start: int, stop: int) -> Masked:
        """Images start to stop (exclusive)."""
        first, last = self.masks.bounds[start], self.masks.bounds[stop]
        return Masked(self.masks.part(start, stop), self.targets.part(first, last))


class DINOv2(Method):
    """Section 4 of arXiv 2304.07193: the teacher sees whole global crops, the student masked ones.

    `head` and `patch_head` (None: shared) build projection heads for the backbone's width,
    `centering` builds a centering for a number of prototypes, once for class tokens and once for
    patches. Without `masking` there is no patch objective. `gram` builds the Gram teacher from the
    backbone (DINOv3, section 4). Provides the matches "embedding", "tokens" (of the student's
    global crops), "patch_embedding" if masked, "gram" with a Gram teacher and, if the heads have
    prototypes, "cls" and "patch", which are the embeddings again.
    """

    inherits = ("head", "patch_head", "centering", "masking")
    not_inherited = ("step", "teachers.gram.")

    student: Student
    step: Tensor

    def __init__(
        self,
        backbone: Backbone,
        head: Callable[[int], DINOHead],
        momentum: Annotated[Schedule, Values(Fraction)],
        teacher_temp: Annotated[Schedule, Values(Positive)],
        centering: Callable[[int], Any],
        masking: BlockMasking | None = None,
        patch_head: Callable[[int], DINOHead] | None = None,
        gram: Callable[[nn.Module], SnapshotTeacher] | None = None,
    ) -> None:
        super().__init__()
        if masking is not None and not backbone.takes_masks:
            raise UserError(
                "method.masking: this backbone has no mask token; set backbone.mask_token=true (a "
                "vision transformer), or method.masking=null and ~loss.ibot."
            )
        width = backbone.embed_dim
        of_patches = None if patch_head is None or masking is None else patch_head(width)
        self.student = Student(backbone, head(width), of_patches)
        teachers: dict[str, nn.Module] = {"ema": EMATeacher(self.student, momentum)}
        anchor = None if gram is None else gram(backbone)
        if anchor is not None and anchor.is_used:
            teachers["gram"] = anchor
        self.teachers = nn.ModuleDict(teachers)
        self.centering = centering(self.student.head.num_prototypes)
        self.patch_centering: Any = None
        if masking is not None:
            self.patch_centering = centering(self.student.of_patches.num_prototypes)
        self.masking, self.teacher_temp = masking, teacher_temp
        self.masks_crops = masking is not None
        offered = {
            "embedding": True,
            "cls": self.student.head.num_prototypes > 0,
            "tokens": True,
            "patch_embedding": masking is not None,
            "patch": masking is not None and self.student.of_patches.num_prototypes > 0,
            "gram": gram is not None,
        }
        self.provides = tuple(name for name, is_there in offered.items() if is_there)
        self.register_buffer("step", torch.zeros((), dtype=torch.long))
        self._num_steps: int | None = None  # cached value of `step` on the host
        hook: Callable[..., Any] = self.register_load_state_dict_post_hook
        hook(_forget)

    @property
    def ema(self) -> EMATeacher:
        """The teacher for class tokens and patches."""
        return cast(EMATeacher, self.teachers["ema"])

    @property
    def gram(self) -> SnapshotTeacher | None:
        """The Gram teacher: its similarities between patches are the targets of Gram anchoring."""
        return cast("SnapshotTeacher | None", dict(self.teachers.items()).get("gram"))

    @torch.no_grad()
    def targets(self, crops: Crops, at: Progress) -> StepTargets:
        """The teacher's distributions for global crops and for masked patches and, once it is
        active, the Gram teacher's patches.
        """
        teacher, temp = self.ema.module, self.teacher_temp(at)
        globals_ = crops.globals_.flatten(0, 1)  # G*n C H W
        tokens: Tokens = teacher.backbone(globals_, cls_only=self.masking is None)
        z = teacher.head(tokens.cls).unflatten(0, crops.globals_.shape[:2])  # G n E
        weight, grid = torch.full_like(z[0, :, 0], 1.0 / crops.num_images), tokens.grid
        pairs = cross_view_pairs(len(z), len(crops.boxes))
        found: StepTargets = {
            "embedding": centered(z, teacher.head, self.centering, temp, pairs, weight)
        }
        if self.masking is not None:
            masks = self._draw_masks(self.masking, crops, grid)
            z = teacher.of_patches(masks.select(tokens.patches))[None]  # 1 M E
            one = torch.ones(1, 1, dtype=torch.float64)
            found["patch_embedding"] = Masked(
                masks,
                centered(z, teacher.of_patches, self.patch_centering, temp, one, masks.weight),
            )
        if self.gram is not None and self.gram.is_on(at):
            # Larger crops without photometric distortions, if the data module delivers them.
            anchors = crops.extra.get("gram", crops.globals_)
            tokens = self.gram.module(anchors.flatten(0, 1))
            patches = regrid(tokens.patches, tokens.grid, grid)
            patches = patches.view(*anchors.shape[:2], *patches.shape[1:])  # G n P D
            found["gram"] = Anchor(patches, weight)
        return found

    def _draw_masks(self, masking: BlockMasking, crops: Crops, grid: tuple[int, int]) -> Masks:
        """The masks of this step."""
        if self._num_steps is None:  # synchronizes with the device, once
            self._num_steps = int(self.step)
        return draw_masks(masking, crops, grid, self._num_steps)

    def compare(self, crops: Crops, targets: StepTargets) -> StepOutputs:
        """The student's scores for all crops and for masked patches, matched with their targets."""
        student, masked = self.student, cast("Masked | None", targets.get("patch_embedding"))
        mask = None if masked is None else masked.masks.mask.flatten(0, 1)  # G*n P
        whole = masked is not None or "gram" in targets or self.needs_patches
        tokens: Tokens = student.backbone(
            crops.globals_.flatten(0, 1), mask=mask, cls_only=not whole
        )
        cls = [tokens.cls]
        if crops.locals_ is not None:
            cls.append(student.backbone(crops.locals_.flatten(0, 1), cls_only=True).cls)
        z = student.head(torch.cat(cls))  # S*n E
        z = z.reshape(-1, crops.num_images, z.shape[-1])
        of_cls = cast(Targets, targets["embedding"])
        outputs = {
            "embedding": Match(Scores(z, student.head.prototypes()), of_cls),
            "tokens": Match(tokens, of_cls),
        }
        if masked is not None:
            z = student.of_patches(masked.masks.select(tokens.patches))[None]  # 1 M E
            scores = Scores(z, student.of_patches.prototypes())
            outputs["patch_embedding"] = Match(scores, masked.targets)
        if "gram" in targets:
            outputs["gram"] = Match(tokens, cast(Anchor, targets["gram"]))
        for name, same in (("cls", "embedding"), ("patch", "patch_embedding")):
            if name in self.provides:
                outputs[name] = outputs[same]
        return outputs

    def after_step(self, at: Progress, ok: Bool[Tensor, ""]) -> None:
        """Update teachers and centers, and count the step."""
        self.ema.after_step(self.student, at, ok)
        if self.gram is not None:
            self.gram.after_step(self.ema.module.backbone, at, ok)
        self.centering.after_step(ok)
        if self.patch_centering is not None:
            self.patch_centering.after_step(ok)
        self.step += 1
        self._num_steps = None if self._num_steps is None else self._num_steps + 1

    @classmethod
    def requires_weights(cls, settings: Mapping[str, Any]) -> str | None:
        """Gram anchoring from the first step on requires trained weights."""
        if (settings.get("gram") or {}).get("start_step") != 0:
            return None
        return (
            "method.gram.start_step=0 without checkpoint= or backbone.pretrained=: patches would "
            "be anchored to an untrained network"
        )

    def begin(self, weights: Mapping[str, Tensor]) -> None:
        """As in `Method`; the Gram teacher starts as a copy of the loaded teacher."""
        super().begin(weights)
        if self.gram is not None:
            self.gram.module.load_state_dict(self.ema.module.backbone.state_dict())

    def schedules(self) -> dict[str, Schedule]:
        """Schedules by the name under which they are logged."""
        temp = {"teacher_temp": self.teacher_temp} if "cls" in self.provides else {}
        return {"momentum": self.ema.momentum} | temp

    def export_backbone(self) -> Backbone:
        """The teacher's backbone."""
        backbone: Backbone = self.ema.module.backbone
        return backbone


def _forget(method: nn.Module, keys: Any) -> None:
    """Invalidate the cached step after weights were loaded."""
    cast(DINOv2, method)._num_steps = None
