"""Checkpoints of a run: last.ckpt at intervals, best.ckpt at the highest k-NN accuracy."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Checkpoint

from dino_lite.contracts import UserError
from dino_lite.distributed import broadcast_value
from dino_lite.settings.kinds import Positive, Size
from dino_lite.settings.validate import checked


class Checkpoints(Checkpoint):
    """Writes checkpoints/last.ckpt and best.ckpt in `run_dir` (default: the trainer's root).

    last: every `every_n_minutes` or `every_n_steps`, at the end, and when the run is interrupted.
    best: whenever `knn` reaches a new maximum, which is stored in checkpoints. Files are replaced
    atomically and hold the state between two optimizer steps: on Ctrl-C the current step is
    completed first. (A second Ctrl-C aborts it; the previous last.ckpt is kept.)
    """

    @checked
    def __init__(
        self,
        run_dir: str | Path | None = None,
        every_n_minutes: Positive | None = 10.0,
        every_n_steps: Size | None = None,
    ) -> None:
        self.run_dir = run_dir
        self.every_n_minutes, self.every_n_steps = every_n_minutes, every_n_steps
        self.best: float | None = None
        self._saved_at = -1  # step of last.ckpt
        self._saved_time = 0.0
        self._between_steps = True
        self._asked_to_stop = False
        self._handler_before: Any = None

    def state_dict(self) -> dict[str, Any]:
        """The best k-NN so far."""
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the best k-NN so far."""
        self.best = state_dict["best"]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the timer, and install the SIGINT handler that waits for the end of the step."""
        self._saved_time, self._saved_at = time.monotonic(), trainer.global_step
        self._asked_to_stop, self._between_steps = False, True
        in_charge = threading.current_thread() is threading.main_thread()
        if in_charge and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            self._handler_before = signal.signal(
                signal.SIGINT, self._on_interrupt if trainer.is_global_zero else signal.SIG_IGN
            )

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Mark the state as inconsistent until the end of the step."""
        self._between_steps = False

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Save checkpoints that are due, then stop if an interrupt was requested."""
        self._between_steps = True
        self._save_best(trainer)
        if self._is_due(trainer, pl_module):
            self._save(trainer, "last.ckpt")
        if self._asked_to_stop:
            raise KeyboardInterrupt

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save the final state."""
        self._save_best(trainer)
        if trainer.global_step > 0:
            self._save(trainer, "last.ckpt")
        self._give_back_handler()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Save the state if it is consistent: on rank 0 only, since other ranks may have exited."""
        self._give_back_handler()
        step = trainer.global_step
        if not (self._between_steps and trainer.is_global_zero and step > max(self._saved_at, 0)):
            return
        try:
            self._save(trainer, "last.ckpt", alone=True)
        except UserError as error:  # the original exception is more important
            sys.stderr.write(f"{error}\n")

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Restore the previous SIGINT handler."""
        self._give_back_handler()

    def _is_due(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> bool:
        if self.every_n_steps and trainer.global_step % self.every_n_steps == 0:
            return trainer.global_step != self._saved_at
        if self.every_n_minutes is None:
            return False
        waited = time.monotonic() - self._saved_time >= 60 * self.every_n_minutes
        return bool(broadcast_value(float(waited), pl_module.device))  # all ranks must save

    def _save_best(self, trainer: pl.Trainer) -> None:
        knn = float(trainer.callback_metrics.get("knn", float("nan")))
        if knn > (float("-inf") if self.best is None else self.best):
            self.best = knn
            self._save(trainer, "best.ckpt")

    def _save(self, trainer: pl.Trainer, name: str, alone: bool = False) -> None:
        """Write `name` atomically; all ranks must call it unless `alone`."""
        folder = Path(self.run_dir or trainer.default_root_dir).expanduser() / "checkpoints"
        path, part = folder / name, folder / f".{name}.part"
        try:
            if alone:
                checkpoint = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
                trainer.strategy.save_checkpoint(checkpoint, part)
            else:
                trainer.save_checkpoint(part, weights_only=False)
            if trainer.is_global_zero:
                os.replace(part, path)
        except (OSError, RuntimeError) as error:
            if trainer.is_global_zero:
                part.unlink(missing_ok=True)
            raise UserError(
                f"Cannot write {path} ({error}): free disk space, then run the same command again."
            ) from error
        if name == "last.ckpt":
            self._saved_at, self._saved_time = trainer.global_step, time.monotonic()

    def _on_interrupt(self, number: int, frame: FrameType | None) -> None:
        if self._asked_to_stop:
            raise KeyboardInterrupt
        self._asked_to_stop = True
        sys.stderr.write(
            "\nStopping after this step and saving; press Ctrl-C again to stop at once.\n"
        )

    def _give_back_handler(self) -> None:
        if self._handler_before is not None:
            signal.signal(signal.SIGINT, self._handler_before)
            self._handler_before = None
