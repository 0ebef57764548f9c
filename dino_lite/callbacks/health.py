"""Detects collapse: logs statistics of the outputs that a step computes anyway, and warns."""

from __future__ import annotations

import sys
import time
from collections import deque
from typing import Any, Literal, cast

import pytorch_lightning as pl
from torch import nn
from tqdm import tqdm  # type: ignore[import-untyped]

from dino_lite.callbacks.progress import run_fraction
from dino_lite.contracts import Crops, Scores, StepOutputs, Targets, UserError
from dino_lite.distributed import broadcast_value
from dino_lite.eval.collapse import (
    EARLIEST,
    LASTING,
    SKIPPED,
    WINDOW,
    Alarm,
    Look,
    collapse,
    health,
    look,
)
from dino_lite.settings.kinds import Size
from dino_lite.settings.validate import checked

_MOST_IMAGES = 256  # of rank 0's batch in one sample


class Health(pl.Callback):
    """Logs `eval.collapse.health` of the match `reads`, and the time it took as `health_seconds`,
    every `every_n_steps` optimizer steps (default: as often as the trainer logs, more often in
    short runs).

    Reads what rank 0's step has computed for its loss; no forward pass is repeated, and neither
    random state nor weights change. Steps that were skipped are counted, and their outputs ignored.
    Each kind of alarm is printed once and kept in `warnings`. `on_collapse`: "warn", or "stop" to
    end the run with the message of a collapse, after saving last.ckpt.
    """

    @checked
    def __init__(
        self,
        reads: str = "embedding",
        every_n_steps: Size | None = None,
        on_collapse: Literal["warn", "stop"] = "warn",
    ) -> None:
        self.reads, self.every_n_steps, self.on_collapse = reads, every_n_steps, on_collapse
        self.warnings: list[dict[str, Any]] = []  # kind, step, text
        self._looks: deque[Look] = deque(maxlen=WINDOW)
        self._now: Look | None = None
        self._seconds = 0.0
        self._streak, self._since = 0, 0.0  # consecutive samples with a collapse; fraction at start
        self._ending: Alarm | None = None  # ends the run before its next step

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check that no teacher shares weights with the student."""
        method = cast(Any, pl_module).method
        for name, teacher in method.teachers.items():
            if _storages(method.student) & _storages(teacher.module):
                self._tell(trainer, _aliased(name))
        if self._ending is not None:
            raise UserError(self._ending.text)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Crops, batch_idx: int
    ) -> None:
        """Request a sample if one is due. With `on_collapse="stop"`, end the run here, between two
        steps, so that last.ckpt is consistent.
        """
        if self.on_collapse == "stop" and self._is_due(trainer.global_step, trainer):
            ending = broadcast_value(float(self._ending is not None), pl_module.device)
            if ending:
                raise UserError(
                    self._ending.text if self._ending else "the run has collapsed; see rank 0."
                )
        due = trainer.is_global_zero and self._is_due(trainer.global_step + 1, trainer)
        self._now, self._seconds = None, 0.0
        cast(Any, pl_module).watch = self._look if due else None

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Crops,
        batch_idx: int,
    ) -> None:
        """Log the statistics and check them for a collapse."""
        if not trainer.is_global_zero or not self._is_due(trainer.global_step, trainer):
            return
        started, module = time.monotonic(), cast(Any, pl_module)
        was_skipped = self._tell_skipped(trainer, module)
        if self._now is None or was_skipped:
            return
        self._looks.append(self._now)
        values = health(self._looks)
        alarm = collapse(values, len(self._now.probs), self._now.temp)
        if self._lasts(alarm, run_fraction(trainer, pl_module)) and alarm is not None:
            self._tell(trainer, _blame(alarm, module.rate_doubt))
        values["health_seconds"] = self._seconds + time.monotonic() - started
        for logger in trainer.loggers:  # log_dict would repeat them in all later rows
            logger.log_metrics(values, step=trainer.global_step - 1)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Count the skipped steps of the whole run."""
        self._tell_skipped(trainer, pl_module)

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Count the skipped steps until then, unless the device may have failed."""
        if isinstance(exception, UserError | SystemExit):
            self._tell_skipped(trainer, pl_module)

    def _look(self, outputs: StepOutputs) -> None:
        """Add the outputs of a micro-batch to the sample."""
        started, match = time.monotonic(), outputs.get(self.reads)
        room = _MOST_IMAGES - (0 if self._now is None else self._now.num_images)
        if match is None or room <= 0:
            return
        if isinstance(match.student, Scores) and isinstance(match.target, Targets):
            seen = look(match.student, match.target, room)
            self._now = seen if self._now is None else self._now.plus(seen)
        self._seconds += time.monotonic() - started

    def _lasts(self, alarm: Alarm | None, fraction: float) -> bool:
        """Whether the collapse is late enough in the run and has lasted long enough."""
        if alarm is None or fraction < EARLIEST:
            self._streak = 0
            return False
        self._since = self._since if self._streak else fraction
        self._streak += 1
        return self._streak >= WINDOW and fraction - self._since >= LASTING

    def _tell_skipped(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> bool:
        """Keep the number of skipped steps so far; returns whether the last step was skipped."""
        module = cast(Any, pl_module)
        in_a_row, num = module.skipped()
        if num:
            alarm = _skipped(num, trainer.global_step, module.remedy)
            self._tell(trainer, alarm)
            (kept,) = (warning for warning in self.warnings if warning["kind"] == SKIPPED)
            kept.update(alarm._asdict(), step=trainer.global_step)
        return bool(in_a_row)

    def _tell(self, trainer: pl.Trainer, alarm: Alarm) -> None:
        """Keep the first alarm of each kind, and print it; a collapse may end the run instead."""
        if alarm.kind not in {warning["kind"] for warning in self.warnings}:
            self.warnings.append({**alarm._asdict(), "step": trainer.global_step})
            if self.on_collapse == "stop" and alarm.kind != SKIPPED:
                self._ending = alarm  # reported when the run ends
            elif trainer.is_global_zero:
                tqdm.write(f"warning: {alarm.text}", file=sys.stderr)

    def _is_due(self, step: int, trainer: pl.Trainer) -> bool:
        if (every := self.every_n_steps) is None:
            every = max(1, cast(Any, trainer).log_every_n_steps)
            if trainer.max_steps > 0:  # a short run must leave time for a window of samples
                every = min(every, max(1, int(trainer.max_steps * LASTING) // WINDOW))
        return step % every == 0


def _blame(alarm: Alarm, rate_doubt: str | None) -> Alarm:
    """The alarm, with a learning rate far above the usual one as its likeliest cause."""
    what, _, advice = alarm.text.partition("; ")
    return alarm if rate_doubt is None else Alarm(alarm.kind, f"{what}; {rate_doubt}, or {advice}")


def _skipped(num: int, num_steps: int, remedy: str) -> Alarm:
    return Alarm(
        SKIPPED,
        f"{num:,} of {num_steps:,} steps so far had a gradient that is not finite and were "
        f"skipped, which changes no weight; if there are more, {remedy}.",
    )


def _storages(module: nn.Module) -> set[int]:
    """Addresses of the parameters' storages, without those that have none."""
    return {p.untyped_storage().data_ptr() for p in module.parameters()} - {0}


def _aliased(name: str) -> Alarm:
    return Alarm(
        "aliased_teacher",
        f"collapse: the teacher {name!r} shares weights with the student, so each learns from "
        "itself; give the method a copy (dino_lite.nn.teachers.frozen_copy).",
    )
