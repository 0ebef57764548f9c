"""The LightningModule: passes every batch to `Step` and logs the returned scalars."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytorch_lightning as pl
import torch
from torch import nn

from dino_lite.contracts import Crops
from dino_lite.distributed import world_size
from dino_lite.methods.clock import Clock
from dino_lite.methods.method import Method
from dino_lite.methods.step import Step, Watch
from dino_lite.nn.batch_norm import across_ranks
from dino_lite.optim.param_groups import param_groups

_CHECK_EVERY = 50  # steps between checks of the number of skipped steps, each of which synchronizes


class PretrainModule(pl.LightningModule):
    """Final. Manual optimization: one `training_step` is one optimizer step on the rank's whole
    batch.

    `groups` builds the parameter groups of the student, `optimizer` an optimizer from those, `step`
    a Step from method and optimizer. With several ranks, batch normalization is synchronized.
    """

    def __init__(
        self,
        method: Method,
        step: Callable[..., Step],
        optimizer: Callable[[list[dict[str, Any]]], torch.optim.Optimizer],
        clock: Clock,
        groups: Callable[[nn.Module], list[dict[str, Any]]] = param_groups,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.method, self.clock = method, clock
        self.make_step, self._make_optimizer, self._make_groups = step, optimizer, groups
        self.watch: Watch | None = None  # set by callbacks for the steps they observe
        self._step: Step | None = None

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The optimizer over the student's parameter groups."""
        return self._make_optimizer(self._make_groups(self.method.student))

    def bare_step(self) -> Step:
        """A step without a trainer: single process, with a new optimizer."""
        return self.make_step(self.method, optimizer=self.configure_optimizers())

    def on_train_start(self) -> None:
        """Build the step with the trainer's backward, wrapped optimizer and gradient
        synchronization.
        """
        if world_size() > 1:
            across_ranks(self.method)
        # With a plain backward, ranks would silently diverge; with an unwrapped optimizer,
        # global_step would stay 0.
        self._step = self.make_step(
            self.method,
            optimizer=self.optimizers(),
            backward=self.manual_backward,
            no_sync=self._no_sync,
        )
        self.clock.start()

    def training_step(self, crops: Crops, batch_idx: int) -> None:
        """One optimizer step."""
        assert self._step is not None
        at = self.clock.at(self._step.num_steps, self.device)
        scalars = self._step(crops, at, self.watch)
        rates = {"progress": at.fraction, "learning_rate": self._step.learning_rate(at)}
        rates |= {name: schedule(at) for name, schedule in self.method.schedules().items()}
        # As CPU tensors: Lightning would copy floats to the device one by one, synchronizing.
        host = {name: torch.tensor(value) for name, value in rates.items()}
        self.log_dict({**scalars, **host}, batch_size=crops.num_images)
        if self._step.num_steps % _CHECK_EVERY == 0 or self.clock.done(at):
            self._step.check()
        if self.clock.done(at):
            self.trainer.should_stop = True

    def inactive_losses(self) -> list[str]:
        """Names of the losses that no step has computed yet (Gram anchoring before its start)."""
        losses = {} if self._step is None else self._step.losses
        return [name for name in losses if name not in self.trainer.callback_metrics]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the training time so far."""
        checkpoint["train_seconds"] = self.clock.seconds

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the training time."""
        self.clock.seconds = float(checkpoint.get("train_seconds", 0.0))

    def _no_sync(self) -> AbstractContextManager[object]:
        """Suppress the strategy's gradient synchronization, if any, until the last micro-batch."""
        block: Callable[[], AbstractContextManager[object]] = getattr(
            self.trainer.strategy, "block_backward_sync", nullcontext
        )
        return block()
