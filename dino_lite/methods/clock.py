"""How long a run is, in steps or in seconds, and how far it has come."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from typing import Any

import torch

from dino_lite.contracts import Progress
from dino_lite.distributed import broadcast_value

# A timed run is divided into this many ticks, so that schedules need no second form.
_TICKS = 1_000_000.0
# The first steps compile, create the optimizer's state, and use up what the loader has prefetched.
_WARM_UP = (3, 10, 5.0)  # steps at least, at most, and seconds that are enough after the first
_MEASURED = (10, 2.0)  # steps and seconds that a measurement takes at least
_LONG = (3, 20.0)  # of slow steps, fewer are enough


class Clock:
    """Tells schedules where the run stands: by steps, or where `max_seconds` is given by rank 0's
    training time.

    Training time includes evaluation and checkpoints; `seconds` survives a resume through the
    checkpoint. `seconds_per_step` is the mean since the first steps of this process, and None until
    enough of them are measured.
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
        self.seconds_per_step: float | None = None
        self.warm_since: tuple[int, float] | None = None  # step and seconds after the warm-up
        self._first: int | None = None  # step of this process
        self._second = 0.0  # when the step after it began
        self._started: float | None = None

    @classmethod
    def of(cls, trainer: Mapping[str, Any], num_images: int, batch_size: int) -> Clock:
        """The clock of a run with these trainer.max_steps, max_epochs and max_time; `batch_size` is
        images a step over all ranks.
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
        """Of a run measured by steps."""
        return None if self.num_steps is None else self.num_steps / self.steps_per_epoch

    def start(self) -> None:
        """Training begins, or goes on after `seconds` were restored."""
        self._started = time.monotonic() - self.seconds

    def at(self, step: int, device: torch.device) -> Progress:
        """Where optimizer step `step` (from 0) stands; every rank gets rank 0's answer."""
        if self._started is not None:
            self.seconds = time.monotonic() - self._started
            self._measure(step, self.seconds)
        if self.max_seconds is None:
            assert self.num_steps is not None
            return Progress(step, self.num_steps, self.steps_per_epoch)
        self.seconds = broadcast_value(self.seconds, device)
        # A value that is constant over an epoch is so over a hundredth of a timed run.
        return Progress(min(1.0, self.seconds / self.max_seconds) * _TICKS, _TICKS, _TICKS / 100)

    def done(self, at: Progress) -> bool:
        """True once the step at `at` was the last."""
        return at.step >= at.total - (1 if self.max_seconds is None else 0)

    def seconds_left(self, step: int) -> float | None:
        """Until the end of the run, of which `step` steps are done: what the budget has left, or as
        the steps so far were; None until they are measured.
        """
        if self.max_seconds is not None:
            return max(0.0, self.max_seconds - self.seconds)
        if self.seconds_per_step is None or self.num_steps is None:
            return None
        return max(0, self.num_steps - step) * self.seconds_per_step

    def _measure(self, step: int, now: float) -> None:
        """Note that `step` begins."""
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
    """Seconds in a text as 90s, 30m, 2h or 1d, or in a number of minutes; 0 in another text."""
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]*)?)\s*([smhd]?)\s*", str(duration))
    units = {"s": 1, "m": 60, "": 60, "h": 3600, "d": 86_400}
    return 0.0 if match is None else float(match[1]) * units[match[2]]
