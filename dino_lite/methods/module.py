"""The LightningModule: passes every batch to `Step` and logs the returned scalars."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from dino_lite.contracts import Crops
from dino_lite.distributed import all_reduce_mean_, world_size
from dino_lite.methods.clock import Clock
from dino_lite.methods.method import Method
from dino_lite.methods.step import Step, Watch
from dino_lite.nn.batch_norm import across_ranks
from dino_lite.optim.param_groups import param_groups

_CHECK_EVERY = 50  # steps between checks for skipped steps on a GPU, each of which synchronizes


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
        self.in_step = False  # whether student, teacher and optimizer may belong to different steps
        self._step: Step | None = None
        self._skipped_before = 0  # steps skipped before this process
        self._active: set[str] = set()  # losses computed so far
        self._means: dict[str, Tensor] = {}  # of scalars over ranks, at the last logged step

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
        self._step.skipped_total = self._skipped_before
        self.clock.start()

    def training_step(self, crops: Crops, batch_idx: int) -> None:
        """One optimizer step."""
        assert self._step is not None
        self.in_step = True
        at = self.clock.at(self._step.num_steps, self.device)
        scalars = self._step(crops, at, self.watch)
        scalars["skipped_total"] = torch.as_tensor(self._step.skipped_total).float()
        self._active |= scalars.keys()
        is_done = self.clock.done(at)
        if is_done:
            self.trainer.should_stop = True
        rates = {"progress": at.fraction, "learning_rate": self._step.learning_rate(at)}
        rates |= {name: schedule(at) for name, schedule in self.method.schedules().items()}
        # As CPU tensors: Lightning would copy floats to the device one by one, synchronizing.
        host = {name: torch.tensor(value) for name, value in rates.items()}
        self.log_dict({**self._over_ranks(scalars), **host}, batch_size=crops.num_images)
        self.in_step = False
        if is_done or self.device.type == "cpu" or self._step.num_steps % _CHECK_EVERY == 0:
            self.check()

    def _over_ranks(self, scalars: dict[str, Tensor]) -> dict[str, Tensor]:
        """The mean of each scalar over all ranks, at the last step that is logged; at other steps
        there is no collective. Empty until then.
        """
        if world_size() > 1 and self.trainer._logger_connector.should_update_logs:
            values = torch.stack([value.float() for value in scalars.values()])
            self._means = dict(zip(scalars, all_reduce_mean_(values), strict=True))
        return scalars if world_size() == 1 else self._means

    def check(self) -> None:
        """Raise UserError after too many consecutive skipped steps. Synchronizes."""
        if self._step is not None:
            self._step.check()

    def skipped(self) -> tuple[int, int]:
        """Number of skipped steps: the latest ones in a row, and of the whole run. Synchronizes."""
        if self._step is None:
            return 0, self._skipped_before
        return int(self._step.skipped or 0), int(self._step.skipped_total)

    @property
    def rate_doubt(self) -> str | None:
        """Why the learning rate may be too high, None if it is usual."""
        return None if self._step is None else self._step.rate_doubt

    @property
    def remedy(self) -> str:
        """What to change if the run diverges."""
        return "lower optim.rate" if self._step is None else self._step.remedy

    def inactive_losses(self) -> list[str]:
        """Names of the losses that no step has computed yet (Gram anchoring before its start)."""
        losses = {} if self._step is None else self._step.losses
        active = {name.rpartition("/")[2] for name in self._active}  # of any student
        return [name for name in losses if name not in active]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the training time and the number of skipped steps so far."""
        checkpoint["train_seconds"] = self.clock.seconds
        checkpoint["skipped_total"] = self.skipped()[1]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the training time and the number of skipped steps."""
        self.clock.seconds = float(checkpoint.get("train_seconds", 0.0))
        self._skipped_before = int(checkpoint.get("skipped_total", 0))

    def _no_sync(self) -> AbstractContextManager[object]:
        """Suppress the strategy's gradient synchronization, if any, until the last micro-batch."""
        block: Callable[[], AbstractContextManager[object]] = getattr(
            self.trainer.strategy, "block_backward_sync", nullcontext
        )
        return block()
