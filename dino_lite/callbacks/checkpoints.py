"""Checkpoints of a run: last.ckpt at intervals, best.ckpt at the highest k-NN accuracy."""

from __future__ import annotations

import os
import signal
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Checkpoint

from dino_lite.callbacks.finite import demand_finite, not_finite
from dino_lite.contracts import UserError
from dino_lite.distributed import all_reduce_max
from dino_lite.interrupts import Interrupt, Stopped, on_stop
from dino_lite.settings.kinds import Positive, Size
from dino_lite.settings.validate import checked

_AGAIN = 1.0  # seconds after which a Ctrl-C is a second one: `timeout` and torchrun repeat signals


class Checkpoints(Checkpoint):
    """Writes checkpoints/last.ckpt and best.ckpt in `run_dir` (default: the trainer's root).

    last: every `every_n_minutes` or `every_n_steps`, at the end, and when the run is interrupted.
    best: whenever `knn` reaches a new maximum, which is stored in checkpoints. Files are replaced
    atomically and hold the state between two optimizer steps. A state with a tensor that is not
    finite is not written and ends the run: no later step could repair it.

    Ctrl-C, SIGTERM, SIGHUP and SIGUSR1, on any rank, end the run after the current step and save
    it. While no step is running (evaluation, waiting for data), rank 0 saves immediately. Before
    the first step there is nothing to save, and the run ends at once, as with a second Ctrl-C. A
    checkpoint that is being written is completed before.
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
        self._is_saving = False
        self._first_step = 0  # of this process
        self._stop: tuple[int, float] | None = None  # signal that asked to stop, and when
        self._at_once = False  # whether a second Ctrl-C came during a save
        self._signals = ExitStack()  # restores the signal handlers
        # Buffers that are not finite by construction, such as masks
        self._constant: set[str] = set()

    def state_dict(self) -> dict[str, Any]:
        """The best k-NN so far."""
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the best k-NN so far."""
        self.best = state_dict["best"]

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Note which buffers are not finite by construction, before weights are restored; keep
        Lightning from handling signals, which it does in the middle of a step.
        """
        self._constant = set(not_finite(dict(pl_module.named_buffers())))
        trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the timer, and install the signal handlers."""
        self._saved_time, self._saved_at = time.monotonic(), trainer.global_step
        self._first_step, self._stop, self._at_once = trainer.global_step, None, False
        self._signals.enter_context(on_stop(lambda number, _: self._on_stop(number, trainer)))

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Save checkpoints that are due, then stop if any rank was asked to."""
        self._save_best(trainer)
        is_due, number = self._agree(trainer, pl_module)
        if (is_due or number) and trainer.global_step != self._saved_at:
            self._save(trainer, "last.ckpt")
        if number:
            raise Stopped(number)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save the final state."""
        self._save_best(trainer)
        if trainer.global_step > 0:
            self._save(trainer, "last.ckpt")
        self._signals.close()
        if self._stop is not None:
            raise Stopped(self._stop[0])

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Save the state if it is consistent."""
        self._signals.close()
        if _is_between_steps(trainer) and trainer.global_step > max(self._saved_at, 0):
            try:
                self._save(trainer, "last.ckpt")
            except UserError as error:  # the original exception is more important
                if str(error) != str(exception):
                    sys.stderr.write(f"{error}\n")

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Restore the previous signal handlers."""
        self._signals.close()

    def _agree(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> tuple[bool, int]:
        """Whether last.ckpt is due, and the signal that asked any rank to stop (0: none)."""
        waited = time.monotonic() - self._saved_time
        is_due = self.every_n_minutes is not None and waited >= 60 * self.every_n_minutes
        stop = 0 if self._stop is None else self._stop[0]
        values = [float(is_due and trainer.is_global_zero), float(stop)]
        by_time, stop = (int(value) for value in all_reduce_max(values, pl_module.device))
        by_step = self.every_n_steps and trainer.global_step % self.every_n_steps == 0
        return bool(by_time or by_step), stop

    def _save_best(self, trainer: pl.Trainer) -> None:
        knn = float(trainer.callback_metrics.get("knn", float("nan")))
        if knn > (float("-inf") if self.best is None else self.best):
            self.best = knn
            self._save(trainer, "best.ckpt")

    def _save(self, trainer: pl.Trainer, name: str) -> None:
        """Write `name` atomically, on rank 0. Raises UserError if the state is not finite."""
        folder = Path(self.run_dir or trainer.default_root_dir).expanduser() / "checkpoints"
        path, part = folder / name, folder / f".{name}.part"
        self._is_saving = True
        try:
            demand_finite(trainer, self._constant, path)
            if trainer.is_global_zero:
                checkpoint = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
                trainer.strategy.save_checkpoint(checkpoint, part)
                os.replace(part, path)
        except (OSError, RuntimeError) as error:
            part.unlink(missing_ok=True)
            if "DataLoader worker" in str(error):  # raised by torch's handler of SIGCHLD
                raise
            raise UserError(
                f"Cannot write {path} ({error}): free disk space, then run the same command again."
            ) from error
        finally:
            self._is_saving = False
        if name == "last.ckpt":
            self._saved_at, self._saved_time = trainer.global_step, time.monotonic()
        if self._at_once:
            self._at_once = False
            raise Interrupt

    def _on_stop(self, number: int, trainer: pl.Trainer) -> None:
        """Signal handler, called between two instructions of the main thread."""
        now, is_ctrl_c = time.monotonic(), number == signal.SIGINT
        is_first = self._stop is None
        self._stop = asked = self._stop or (number, now)
        if not trainer.is_global_zero:
            return
        is_again = is_ctrl_c and now - asked[1] > _AGAIN
        if is_again and self._is_saving:
            self._at_once = True
            sys.stderr.write("\nStopping when the checkpoint is written.\n")
        elif is_again or trainer.global_step == self._first_step:
            raise Interrupt(number)
        elif is_first:
            by = "" if is_ctrl_c else f"{signal.Signals(number).name}: "
            hint = "; press Ctrl-C again to stop at once" if is_ctrl_c else ""
            sys.stderr.write(f"\n{by}Stopping after this step and saving{hint}.\n")
            # An evaluation may take longer than the system waits.
            if _is_between_steps(trainer) and not self._is_saving:
                self._save(trainer, "last.ckpt")


def _is_between_steps(trainer: pl.Trainer) -> bool:
    """Whether student, teacher and optimizer belong to the same step."""
    return not cast(Any, trainer.lightning_module).in_step
