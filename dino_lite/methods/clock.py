"""What a run is measured by: a number of steps, or a budget of seconds."""

from __future__ import annotations

import time

import torch

from dino_lite.contracts import Progress
from dino_lite.distributed import broadcast_value

# a timed run is divided into that many ticks, so that schedules need no second form
_TICKS = 1_000_000.0


class Clock:
    """Tells schedules where the run stands: by steps, or where `max_seconds` is given by rank 0's
    training time.

    Training time includes evaluation and checkpoints; `seconds` survives a resume through the
    checkpoint.
    """

    def __init__(
        self, num_steps: int | None, max_seconds: float | None, steps_per_epoch: float
    ) -> None:
        if (num_steps is None) == (max_seconds is None):
            raise ValueError("a run is measured by steps or by seconds, by exactly one of them")
        self.num_steps, self.max_seconds, self.steps_per_epoch = (
            num_steps,
            max_seconds,
            steps_per_epoch,
        )
        self.seconds = 0.0
        self._started: float | None = None

    def start(self) -> None:
        """Training begins, or goes on after `seconds` were restored."""
        self._started = time.monotonic() - self.seconds

    def at(self, step: int, device: torch.device) -> Progress:
        """Where optimizer step `step` (from 0) stands; every rank gets rank 0's answer."""
        if self._started is not None:
            self.seconds = time.monotonic() - self._started
        if self.max_seconds is None:
            assert self.num_steps is not None
            return Progress(step, self.num_steps, self.steps_per_epoch)
        self.seconds = broadcast_value(self.seconds, device)
        # What holds a value for an epoch holds it for a hundredth of a timed run.
        return Progress(min(1.0, self.seconds / self.max_seconds) * _TICKS, _TICKS, _TICKS / 100)

    def done(self, at: Progress) -> bool:
        """True once the step at `at` was the last."""
        return at.step >= at.total - (1 if self.max_seconds is None else 0)
