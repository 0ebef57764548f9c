"""A teacher that is a frozen snapshot of another teacher."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from dino_lite.contracts import Progress
from dino_lite.nn.teachers import frozen_copy
from dino_lite.optim.schedules import Span, span_steps
from dino_lite.settings.kinds import Size
from dino_lite.settings.validate import checked


class SnapshotTeacher(nn.Module):
    """A frozen snapshot of another teacher, taken at `start_step` and again every `every`, at most
    `most` times (Gram anchoring: DINOv3, section 4.2). With `start_step=None` it is not used.

    With a start of 0, the first snapshot is the network with which the run begins. The number of
    snapshots is saved with the weights, so a resumed run continues with the same snapshot.
    """

    taken: Tensor

    @checked
    def __init__(
        self,
        module: nn.Module,
        start_step: Span | None,
        every: Span | None = None,
        most: Size = 1,
    ) -> None:
        super().__init__()
        self.module: Any = nn.Identity() if start_step is None else frozen_copy(module)
        self.start_step, self.every, self.most = start_step, every, most
        self.register_buffer("taken", torch.zeros((), dtype=torch.long))
        self._known: int | None = None  # cached value of `taken` on the host
        hook: Callable[..., Any] = self.register_load_state_dict_post_hook
        hook(_forget)

    @property
    def is_used(self) -> bool:
        """Whether a snapshot is ever taken."""
        return self.start_step is not None

    def is_on(self, at: Progress) -> bool:
        """Whether it is active at this step: a snapshot is due and was taken. (In a timed run, it
        is taken after the first step at which it is due.)
        """
        return self._due(at.step, at) > 0 and self._count(at) > 0

    @torch.no_grad()
    def after_step(self, student: nn.Module, at: Progress, ok: Bool[Tensor, ""]) -> None:
        """Take a snapshot of `student`, which is the other teacher, if one is due at the next step.

        Also after a skipped step, which leaves the other teacher unchanged.
        """
        due = self._due(at.step + 1, at)
        if due > self._count(at):
            self.module.load_state_dict(student.state_dict())
            self.taken.fill_(due)
            self._known = due

    def _count(self, at: Progress) -> int:
        """Number of snapshots taken; with a start of 0, the initial weights count as one."""
        if self._known is None:  # synchronizes with the device, once
            self._known = max(int(self.taken), self._due(0, at))
        return self._known

    def _due(self, step: float, at: Progress) -> int:
        """Number of snapshots due before `step`."""
        if self.start_step is None:
            return 0
        since = step - span_steps(self.start_step, at)
        if since < 0:
            return 0
        every = 0.0 if self.every is None else span_steps(self.every, at)
        return min(self.most, 1 + int(since // every)) if every > 0 else 1


def _forget(teacher: nn.Module, keys: Any) -> None:
    """Invalidate the cached count after weights were loaded."""
    cast(SnapshotTeacher, teacher)._known = None
