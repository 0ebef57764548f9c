"""The one LightningModule: hands every batch to `Step`, and logs what it returns."""

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

_CHECK_EVERY = (
    50  # steps between looks at the count of skipped steps, which make the host wait for the device
)


class PretrainModule(pl.LightningModule):
    """Final. Manual optimization: one `training_step` is one optimizer step on the rank's whole
    batch.

    `groups` makes parameter groups of the student, `optimizer` an optimizer of those; `step` makes
    a Step of method and optimizer. With several ranks, batch normalization counts the images of
    all of them.
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
        self.watch: Watch | None = None  # a callback's, for the steps it wants to see
        self._step: Step | None = None

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The optimizer over the student's parameter groups."""
        return self._make_optimizer(self._make_groups(self.method.student))

    def bare_step(self) -> Step:
        """The step without a trainer: of one process, with an optimizer of its own."""
        return self.make_step(self.method, optimizer=self.configure_optimizers())

    def on_train_start(self) -> None:
        """Bind the step to this trainer: its backward, its wrapped optimizer, its gradient
        exchange.
        """
        if world_size() > 1:
            across_ranks(self.method)
        # A plain backward lets ranks drift apart without an error; a raw optimizer leaves
        # global_step at 0.
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
        # Tensors on the host: Lightning would send floats to the device one by one, and wait.
        host = {name: torch.tensor(value) for name, value in rates.items()}
        self.log_dict({**scalars, **host}, batch_size=crops.num_images)
        if self._step.num_steps % _CHECK_EVERY == 0 or self.clock.done(at):
            self._step.check()
        if self.clock.done(at):
            self.trainer.should_stop = True

    def inactive_losses(self) -> list[str]:
        """Names of the losses that no step has computed yet, as Gram anchoring before its start."""
        losses = {} if self._step is None else self._step.losses
        return [name for name in losses if name not in self.trainer.callback_metrics]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Training time so far travels with the weights."""
        checkpoint["train_seconds"] = self.clock.seconds

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on from the checkpoint's training time."""
        self.clock.seconds = float(checkpoint.get("train_seconds", 0.0))

    def _no_sync(self) -> AbstractContextManager[object]:
        """Hold gradients back until the last micro-batch, where the strategy exchanges any."""
        block: Callable[[], AbstractContextManager[object]] = getattr(
            self.trainer.strategy, "block_backward_sync", nullcontext
        )
        return block()
