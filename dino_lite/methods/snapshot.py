"""A teacher that is another one as it once was."""

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
    """Another teacher as it was when the run reached `start_step`, taken anew `every` so often,
    `most` times in all (Gram anchoring: DINOv3, section 4.2). Without a start it is not used.

    From a start of 0 on it is, at first, what the run began with. How often it was taken is kept
    with the weights, so a resumed run goes on with the same.
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
        self._known: int | None = None  # `taken`, on the host
        hook: Callable[..., Any] = self.register_load_state_dict_post_hook
        hook(_forget)

    @property
    def is_used(self) -> bool:
        """Whether it ever starts."""
        return self.start_step is not None

    def is_on(self, at: Progress) -> bool:
        """Whether it teaches at this step: it is due, and was taken (in a run by the clock, after
        the step that found it due).
        """
        return self._due(at.step, at) > 0 and self._count(at) > 0

    @torch.no_grad()
    def after_step(self, student: nn.Module, at: Progress, ok: Bool[Tensor, ""]) -> None:
        """Become a copy of `student`, which is the other teacher, where the next step asks for it.

        Also after a step that was skipped: the other teacher did not move then.
        """
        due = self._due(at.step + 1, at)
        if due > self._count(at):
            self.module.load_state_dict(student.state_dict())
            self.taken.fill_(due)
            self._known = due

    def _count(self, at: Progress) -> int:
        """How often it was taken; what the run begins with counts where it starts at once."""
        if self._known is None:  # waits for the device, once
            self._known = max(int(self.taken), self._due(0, at))
        return self._known

    def _due(self, step: float, at: Progress) -> int:
        """How often it should have been taken before `step`."""
        if self.start_step is None:
            return 0
        since = step - span_steps(self.start_step, at)
        if since < 0:
            return 0
        every = 0.0 if self.every is None else span_steps(self.every, at)
        return min(self.most, 1 + int(since // every)) if every > 0 else 1


def _forget(teacher: nn.Module, keys: Any) -> None:
    """What was known of `taken` is no longer so: weights were loaded."""
    cast(SnapshotTeacher, teacher)._known = None
