"""Progress of a run: a bar in a terminal, otherwise a line of text at intervals."""

from __future__ import annotations

import math
import sys
import time
from typing import Any, cast

import pytorch_lightning as pl
from pytorch_lightning.callbacks import ProgressBar
from tqdm import tqdm  # type: ignore[import-untyped]

from dino_lite.data.labeled import has_labels
from dino_lite.eval.verdict import expectation
from dino_lite.meter import duration
from dino_lite.settings.kinds import NonNegative

_BAR = "{percentage:3.0f} %|{bar:20}| {desc}"


class RunProgress(ProgressBar):
    """Shows loss, k-NN, images/s, fraction of time waiting for data, and time left of the run.

    Works for runs limited by time as well as by steps. In a terminal the bar is redrawn at most
    every `refresh_seconds`; otherwise a line is written every `line_seconds`.
    """

    def __init__(
        self, refresh_seconds: NonNegative = 0.5, line_seconds: NonNegative = 30.0
    ) -> None:
        super().__init__()
        self.refresh_seconds, self.line_seconds = refresh_seconds, line_seconds
        self._enabled = True
        self._bar: Any = None
        self._shown = 0.0  # time of the last update
        self._began = 0.0  # time at which this process began to train

    def enable(self) -> None:
        """Enable output."""
        self._enabled = True

    def disable(self) -> None:
        """Disable output: Lightning calls this on ranks other than 0."""
        self._enabled = False

    def print(self, *args: Any, sep: str = " ", **kwargs: Any) -> None:
        """Write a line without breaking the bar."""
        if self._enabled:
            tqdm.write(sep.join(map(str, args)), file=sys.stdout)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say what to expect of the loss; draw an empty bar."""
        splits = getattr(cast(Any, trainer).datamodule, "splits", None)
        if splits is not None:
            self.print(expectation(has_labels(splits.train)))
        self._began = time.monotonic()
        self._shown = 0.0 if self._is_terminal() else time.monotonic()
        if self._enabled and self._is_terminal():
            self._bar = tqdm(
                total=1.0, bar_format=_BAR, dynamic_ncols=True, file=sys.stderr, leave=True
            )
            self._bar.monitor_interval = 0  # redrawn here, so no monitor thread is needed

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Update at intervals, not every step: reading the loss synchronizes with the device."""
        pause = self.line_seconds if self._bar is None else self.refresh_seconds
        is_last = run_fraction(trainer, pl_module) >= 1  # on_train_end shows it
        if self._enabled and not is_last and time.monotonic() - self._shown >= pause:
            self._show(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Show the final state."""
        if self._enabled and trainer.global_step > 0:
            self._show(trainer, pl_module)
        self._close()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Close the bar before the error message is printed."""
        self._close()

    def _show(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        fraction = run_fraction(trainer, pl_module)
        text = self._describe(trainer, pl_module, fraction)
        self._shown = time.monotonic()
        if self._bar is not None:
            self._bar.n = fraction
            self._bar.set_description_str(text)
        else:
            sys.stdout.write(f"{100 * fraction:3.0f} %  {text}\n")
            sys.stdout.flush()

    def _describe(self, trainer: pl.Trainer, pl_module: pl.LightningModule, fraction: float) -> str:
        values = {name: float(value) for name, value in trainer.callback_metrics.items()}
        parts = [
            (f"step {trainer.global_step:,}", True),
            (f"loss {values.get('loss', 0.0):.3f}", "loss" in values),
            (f"{values.get('skipped_total', 0):.0f} skipped", values.get("skipped_total", 0) > 0),
            (f"k-NN {values.get('knn', 0.0):.1f} %", values.get("knn", -1.0) >= 0),
            (
                f"{values.get('images_per_second', 0.0):,.0f} images/s",
                "images_per_second" in values,
            ),
            (f"{100 * values.get('data_wait', 0.0):.0f} % waiting for data", "data_wait" in values),
            (self._time_left(trainer, pl_module, fraction), True),
        ]
        return " · ".join(text for text, known in parts if known)

    def _time_left(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, fraction: float
    ) -> str:
        if fraction >= 1:
            return f"{duration(time.monotonic() - self._began)} in all"
        module = cast(Any, pl_module)
        left = module.clock.seconds_left(trainer.global_step)
        if left is None:
            return "measuring"
        least = "at least " if module.clock.max_seconds is None and module.inactive_losses() else ""
        return f"{least}{duration(left)} left"

    def _is_terminal(self) -> bool:
        return sys.stderr.isatty()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def run_fraction(trainer: pl.Trainer, pl_module: pl.LightningModule) -> float:
    """Completed fraction of the run, in [0, 1]: of its steps, or of its time if limited by time."""
    clock = cast(Any, pl_module).clock
    if clock.max_seconds is None:
        return min(1.0, trainer.global_step / max(int(clock.num_steps), 1))
    fraction: float = clock.seconds / clock.max_seconds
    return min(1.0, fraction)


def turns(trainer: pl.Trainer, pl_module: pl.LightningModule, every: float) -> int:
    """How many intervals of `every`, a fraction of the run, are completed."""
    return math.floor(run_fraction(trainer, pl_module) / every + 1e-9)
