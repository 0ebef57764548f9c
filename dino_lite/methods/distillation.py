"""Distillation: students learn from a frozen teacher, whose pass over a batch serves all of them.

Objectives are losses; a student has only the heads of the matches that some loss reads.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Annotated, Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from dino_lite import draws
from dino_lite.contracts import (
    Backbone,
    Crops,
    Progress,
    Prototypes,
    Schedule,
    StepOutputs,
    StepTargets,
    Targets,
    Tokens,
    UserError,
)
from dino_lite.distributed import all_gather_cat
from dino_lite.losses.gram import regrid
from dino_lite.methods.dino import centered
from dino_lite.methods.frozen import FrozenTeacher, patch_width
from dino_lite.methods.method import Method
from dino_lite.methods.student import (
    OF_CLS,
    OF_MASKED,
    OF_PATCHES,
    OF_WHOLE,
    Masked,
    Student,
    Taught,
    mixed,
)
from dino_lite.nn.heads import DINOHead
from dino_lite.nn.masking import BlockMasking
from dino_lite.nn.masks import draw_masks
from dino_lite.nn.teachers import EMATeacher
from dino_lite.settings.kinds import Count, Fraction, Positive, Size, Values
from dino_lite.wording import count


class Distillation(Method):
    """Students, each a backbone of any family, learn from one frozen teacher.

    Provides for each student, as "STUDENT/MATCH": "cls" and "patch", scores against the teacher's
    own prototypes, if its file has heads (DINOv3, arXiv 2508.10104, section 5.1: DINO on class
    tokens, iBOT on masked patches); "tokens", as they are; "cls_token", "patch_tokens" and
    "masked_tokens" through LayerNorm and a linear layer (Proteus, arXiv 2409.10366, section 3);
    "cls_similarity" and "patch_similarity" through a linear layer, the former beside a queue of
    `queue_size` class tokens of the teacher. Only those that `reads` names are computed.

    Patches are compared on the student's grid, to which the teacher's are resampled. Masked are
    the patches of students with a mask token. `mixup` mixes pairs of images of a batch with a
    common λ ~ U(0, 1) for teacher and students alike (Zhang et al. 2018, arXiv 1710.09412). A
    running average of each student is evaluated and exported; with a `momentum` of 0 itself.
    """

    not_inherited = ("step", "queue")

    student: nn.ModuleDict
    step: Tensor
    queue: Tensor
    queued: Tensor

    def __init__(
        self,
        backbone: Mapping[str, Backbone],
        head: Callable[[int, int], DINOHead],
        momentum: Annotated[Schedule, Values(Fraction)],
        teacher_temp: Annotated[Schedule, Values(Positive)],
        centering: Callable[[int], Any],
        masking: BlockMasking | None = None,
        mixup: bool = False,
        queue_size: Size = 4096,
        seed: Count = 0,
        teacher: FrozenTeacher | None = None,
        reads: Collection[str] = (),
    ) -> None:
        super().__init__()
        if teacher is None or not isinstance(backbone, Mapping):
            raise UserError(
                "method=distill learns from a teacher: dino-lite distill teacher=WEIGHTS "
                "students=[vit_tiny] trains with it."
            )
        channels, name = teacher.network.backbone.in_chans, teacher.source
        if any(each.in_chans != channels for each in backbone.values()):
            raise UserError(
                f"teacher={name} takes images of {count(channels, 'channel')}, unlike these: set "
                f"data.channels={channels}, or choose another teacher."
            )
        self.teacher, self.reads, self.masking = teacher, frozenset(reads), masking
        self.teacher_temp, self.mixup, self.seed = teacher_temp, mixup, seed
        masked = [name for name, each in backbone.items() if self._masks(each)]
        self.provides = self._offered(bool(masked))
        self.student = nn.ModuleDict(
            {name: Student(each, self._heads(each, head)) for name, each in backbone.items()}
        )
        self.teachers = nn.ModuleDict({"ema": EMATeacher(self.student, momentum, buffers=True)})
        self.centering: Any = None
        if "cls" in self.reads:
            self.centering = centering(self._prototypes("head"))
        # One for each grid, since the masked patches differ; by the first student that has it.
        num = self._prototypes("patch_head")
        of_patches = masked if "patch" in self.reads else []
        self.patch_centering = nn.ModuleDict({name: centering(num) for name in of_patches})
        width = teacher.network.backbone.embed_dim if "cls_similarity" in self.reads else 0
        self.register_buffer("queue", torch.zeros(queue_size if width else 0, width))
        self.register_buffer("queued", torch.zeros((), dtype=torch.long))
        self.register_buffer("step", torch.zeros((), dtype=torch.long))
        self._num_steps: int | None = None  # cached value of `step` on the host
        hook: Callable[..., Any] = self.register_load_state_dict_post_hook
        hook(_forget)

    def _masks(self, backbone: Backbone) -> bool:
        """Whether crops of this student are masked."""
        return bool(self.masking and backbone.takes_masks and self.reads & OF_MASKED)

    def _prototypes(self, kind: str) -> int:
        """The number of prototypes of a head of the teacher; 0 without it."""
        head = self.teacher.network.heads.get(kind)
        return 0 if head is None else head.num_prototypes

    def _offered(self, masks: bool) -> tuple[str, ...]:
        """The matches there are. Raises UserError for prototypes that the teacher does not have."""
        for match, kind, what in (("cls", "head", ""), ("patch", "patch_head", " for patches")):
            if match in self.reads and not self._prototypes(kind):
                raise UserError(
                    f"teacher={self.teacher.source} has no projection head with prototypes{what}, "
                    f"which a loss reads as {match!r}: leave that loss out, or choose "
                    "loss=[cls_token,patch_tokens]."
                )
        offered = {
            "cls": self._prototypes("head") > 0,
            "patch": masks and self._prototypes("patch_head") > 0,
            "masked_tokens": masks,
        }
        always = ("tokens", *sorted(OF_WHOLE))
        return (*always, *(name for name, is_there in offered.items() if is_there))

    def _heads(self, backbone: Backbone, head: Callable[..., DINOHead]) -> dict[str, nn.Module]:
        """The heads of a student, by the match that they serve."""
        teacher, masks = self.teacher.network.backbone, self._masks(backbone)
        ours = theirs = 0
        if self.reads & OF_PATCHES:
            ours, theirs = patch_width(backbone), patch_width(teacher)
        heads: dict[str, nn.Module] = {}
        for match in sorted(self.reads & (OF_PATCHES | OF_CLS | {"cls"})):
            widths = (ours, theirs)
            if match in OF_CLS | {"cls"}:
                widths = (backbone.embed_dim, teacher.embed_dim)
            if match in OF_MASKED and not masks:
                continue
            if match in ("cls", "patch"):
                num = self._prototypes("head" if match == "cls" else "patch_head")
                heads[match] = head(widths[0], num_prototypes=num)
                continue
            linear = nn.Linear(*widths)
            nn.init.trunc_normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)
            normed = match.endswith(("token", "tokens"))
            heads[match] = nn.Sequential(nn.LayerNorm(widths[0]), linear) if normed else linear
        return heads

    @property
    def ema(self) -> EMATeacher:
        """The running average of the students."""
        return cast(EMATeacher, self.teachers["ema"])

    @torch.no_grad()
    def targets(self, crops: Crops, at: Progress) -> StepTargets:
        """What the teacher makes of the batch, once for all students."""
        if self._num_steps is None:  # synchronizes with the device, once
            self._num_steps = int(self.step)
        found: StepTargets = {}
        if self.mixup:
            share = float(draws.unit(draws.hashed(self.seed, draws.MIXUP, self._num_steps))[0])
            found["mixed"] = crops = mixed(crops, share)
        views = crops.extra.get("gram", crops.globals_)  # larger ones, if there are
        tokens = self.teacher(views.flatten(0, 1), cls_only=not self.reads & OF_PATCHES)
        num_crops, num_images = views.shape[:2]
        wide = torch.promote_types(tokens.cls.dtype, torch.float32)
        weight = tokens.cls.new_full((num_images,), 1.0 / num_images, dtype=wide)
        found |= self._prototype_targets(crops, tokens, weight, self.teacher_temp(at))
        cls = tokens.cls.view(num_crops, num_images, -1)  # G n D
        if "cls_similarity" in self.reads:
            self._enqueue_(F.normalize(all_gather_cat(cls[0]).to(self.queue.dtype), dim=-1))
        if crops.locals_ is not None and self.reads & OF_CLS:
            more = self.teacher(crops.locals_.flatten(0, 1), cls_only=True).cls
            cls = torch.cat([cls, more.view(-1, num_images, more.shape[-1])])  # S n D
        patches = tokens.patches.reshape(num_crops, num_images, *tokens.patches.shape[1:])
        taught = Taught(cls, patches, tokens.grid, weight, self.queue, self.queued, {})
        return found | {"taught": taught}

    def _prototype_targets(
        self, crops: Crops, tokens: Tokens, weight: Float[Tensor, "n"], temp: float
    ) -> StepTargets:
        """Distributions over the teacher's prototypes, "cls" and for each student "masked/NAME",
        and the masks; "cls" has none if no loss reads it, but the weights of images.
        """
        heads, shape = self.teacher.network.heads, crops.globals_.shape[:2]
        pairs = torch.ones(shape[0], len(crops.boxes), dtype=torch.float64)
        pairs /= pairs.sum()  # every crop of a student with every view of the teacher
        if "cls" in self.reads:
            z = heads["head"](tokens.cls)
            z = z.view(*shape, z.shape[-1])
            cls = centered(z, heads["head"], self.centering, temp, pairs, weight)
        else:
            z = tokens.cls.view(*shape, -1)
            none = Prototypes(z.new_zeros(0, z.shape[-1]))
            zeros = torch.zeros_like(z[..., 0])
            cls = Targets(z, none, zeros, z.new_zeros(0), temp, pairs.to(z), weight)
        found: StepTargets = {"cls": cls}
        known: dict[tuple[int, int], Masked] = {}
        for name, student in self.student.items():
            backbone = cast(Backbone, student.backbone)
            if not self._masks(backbone):
                continue
            height, width = (side // backbone.patch_size for side in crops.globals_.shape[-2:])
            grid = (height, width)
            if grid not in known:
                known[grid] = self._masked(name, crops, tokens, grid, temp)
            found[f"masked/{name}"] = known[grid]
        return found

    def _masked(
        self, name: str, crops: Crops, tokens: Tokens, grid: tuple[int, int], temp: float
    ) -> Masked:
        assert self.masking is not None
        assert self._num_steps is not None
        masks = draw_masks(self.masking, crops, grid, self._num_steps)
        if "patch" not in self.reads:
            return Masked(masks, None)
        head, one = self.teacher.network.heads["patch_head"], torch.ones(1, 1, dtype=torch.float64)
        z = head(masks.select(regrid(tokens.patches, tokens.grid, grid)))[None]  # 1 M E
        centering = self.patch_centering[name]
        return Masked(masks, centered(z, head, centering, temp, one, masks.weight))

    def _enqueue_(self, rows: Float[Tensor, "B D"]) -> None:
        """Put the unit class tokens of all processes' images, in their order, before the others."""
        self.queue.copy_(torch.cat([rows, self.queue])[: len(self.queue)])
        self.queued.add_(len(rows)).clamp_(max=len(self.queue))

    def compare(self, crops: Crops, targets: StepTargets) -> StepOutputs:
        """Each student's outputs for a micro-batch, matched with the teacher's."""
        crops = cast(Crops, targets.get("mixed", crops))
        taught, outputs = cast(Taught, targets["taught"]), StepOutputs()
        prototypes = cast(Targets, targets["cls"])
        for name, student in self.student.items():
            masked = cast("Masked | None", targets.get(f"masked/{name}"))
            found = cast(Student, student).compare(crops, taught, prototypes, masked, self.reads)
            outputs |= {f"{name}/{match}": each for match, each in found.items()}
        return outputs

    def after_step(self, at: Progress, ok: Bool[Tensor, ""]) -> None:
        """Update the averages and centers, and count the step."""
        self.ema.after_step(self.student, at, ok)
        for centering in filter(None, (self.centering, *self.patch_centering.values())):
            centering.after_step(ok)
        self.step += 1
        self._num_steps = None if self._num_steps is None else self._num_steps + 1

    def schedules(self) -> dict[str, Schedule]:
        """Schedules by the name under which they are logged."""
        temp = {"teacher_temp": self.teacher_temp} if self.reads & {"cls", "patch"} else {}
        return {"momentum": self.ema.momentum} | temp

    def export_backbone(self) -> Backbone:
        """The average of the first student."""
        return next(iter(self.export_backbones().values()))

    def export_backbones(self) -> dict[str, Backbone]:
        """The average of each student."""
        return {name: each.backbone for name, each in self.ema.module.items()}


def _forget(method: nn.Module, keys: Any) -> None:
    """Invalidate the cached step after weights were loaded."""
    cast(Distillation, method)._num_steps = None
