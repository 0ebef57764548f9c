"""Length and progress of a run, in steps or in seconds."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from typing import Any

import torch

from dino_lite.contracts import Progress
from dino_lite.distributed import broadcast_value

# A timed run is divided into this many ticks, so that schedules treat ticks like steps.
_TICKS = 1_000_000.0
# The first steps compile, create optimizer state, and consume prefetched batches.
_WARM_UP = (3, 10, 5.0)  # minimum steps, maximum steps; seconds after the first step that suffice
_MEASURED = (10, 2.0)  # minimum steps and seconds of a measurement
_LONG = (3, 20.0)  # the same for slow steps


class Clock:
    """Progress of the run, for schedules: by steps or, with `max_seconds`, by rank 0's training
    time.

    Training time includes evaluation and checkpoints; `seconds` is saved in checkpoints and
    restored on resume. `seconds_per_step` is the mean over the steps of this process after its
    warm-up, None until enough of them are measured.
    """

    def __init__(
        self, num_steps: int | None, max_seconds: float | None, steps_per_epoch: float
    ) -> None:
        if (num_steps is None) == (max_seconds is None):
            raise ValueError("give exactly one of num_steps and max_seconds")
        self.num_steps, self.max_seconds, self.steps_per_epoch = (
            num_steps,
            max_seconds,
            steps_per_epoch,
        )
        self.seconds = 0.0
        self.seconds_per_step: float | None = None
        self.warm_since: tuple[int, float] | None = None  # step and seconds at the warm-up's end
        self._first: int | None = None  # first step of this process
        self._second = 0.0  # seconds when the step after it began
        self._started: float | None = None

    @classmethod
    def of(cls, trainer: Mapping[str, Any], num_images: int, batch_size: int) -> Clock:
        """The clock for trainer.max_steps, max_epochs or max_time; `batch_size` is images per step
        over all ranks.
        """
        steps_per_epoch = num_images / batch_size
        if trainer["max_time"] is not None:
            return cls(None, seconds(trainer["max_time"]), steps_per_epoch)
        num_steps = trainer["max_steps"]
        if num_steps is None:
            num_steps = max(1, round((trainer["max_epochs"] or 0) * steps_per_epoch))
        return cls(num_steps, None, steps_per_epoch)

    @property
    def num_epochs(self) -> float | None:
        """Length in epochs; None for a timed run."""
        return None if self.num_steps is None else self.num_steps / self.steps_per_epoch

    def start(self) -> None:
        """Start the clock, or continue from restored `seconds`."""
        self._started = time.monotonic() - self.seconds

    def at(self, step: int, device: torch.device) -> Progress:
        """Progress at optimizer step `step` (from 0), the same on every rank."""
        if self._started is not None:
            self.seconds = time.monotonic() - self._started
            self._measure(step, self.seconds)
        if self.max_seconds is None:
            assert self.num_steps is not None
            return Progress(step, self.num_steps, self.steps_per_epoch)
        self.seconds = broadcast_value(self.seconds, device)
        # A timed run has 100 "epochs", for schedules that change per epoch.
        return Progress(min(1.0, self.seconds / self.max_seconds) * _TICKS, _TICKS, _TICKS / 100)

    def done(self, at: Progress) -> bool:
        """Whether the step at `at` is the last."""
        return at.step >= at.total - (1 if self.max_seconds is None else 0)

    def seconds_left(self, step: int) -> float | None:
        """Seconds left after `step` steps: the rest of the time budget, or extrapolated from the
        measured steps (None until they are measured).
        """
        if self.max_seconds is not None:
            return max(0.0, self.max_seconds - self.seconds)
        if self.seconds_per_step is None or self.num_steps is None:
            return None
        return max(0, self.num_steps - step) * self.seconds_per_step

    def _measure(self, step: int, now: float) -> None:
        """Record that `step` begins at `now` seconds."""
        if self._first is None:
            self._first = step
        steps = step - self._first
        if self.warm_since is None:
            self._second = now if steps == 1 else self._second
            least, most, enough = _WARM_UP
            if steps >= most or (steps >= least and now - self._second >= enough):
                self.warm_since = (step, now)
            return
        steps, spent = step - self.warm_since[0], now - self.warm_since[1]
        measured = any(steps >= n and spent >= least for n, least in (_MEASURED, _LONG))
        if self.seconds_per_step is not None or measured:
            self.seconds_per_step = spent / steps


def seconds(duration: str | float) -> float:
    """Seconds in "90s", "30m", "2h", "1d" or a number of minutes; 0 if it is none of these."""
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]*)?)\s*([smhd]?)\s*", str(duration))
    units = {"s": 1, "m": 60, "": 60, "h": 3600, "d": 86_400}
    return 0.0 if match is None else float(match[1]) * units[match[2]]
