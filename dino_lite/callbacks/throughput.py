"""Logs training speed and the fraction of time spent waiting for data."""

from __future__ import annotations

import time
from typing import Any, cast

import pytorch_lightning as pl
import torch

from dino_lite.contracts import Crops
from dino_lite.settings.kinds import Size
from dino_lite.settings.validate import checked


class Throughput(pl.Callback):
    """Logs `images_per_second` over all ranks and `data_wait`, the fraction of time spent waiting
    for data.

    Both are means over the last `log_every` optimizer steps (default: as often as the trainer
    logs), including evaluations and checkpoints between them.
    """

    @checked
    def __init__(self, log_every: Size | None = None) -> None:
        self.log_every = log_every
        self._images, self._started, self._waited = 0, 0.0, 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the first window."""
        self._restart(trainer)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Crops,
        batch_idx: int,
    ) -> None:
        """Count images; log at the end of a window."""
        self._images += batch.num_images * trainer.world_size
        log_every = self.log_every or max(1, cast(Any, trainer).log_every_n_steps)
        if trainer.global_step % log_every:
            return
        seconds = max(time.monotonic() - self._started, 1e-9)
        waited = min(1.0, (seconds_waited(trainer) - self._waited) / seconds)
        values = {"images_per_second": self._images / seconds, "data_wait": waited}
        trainer.callback_metrics.update({k: torch.tensor(v) for k, v in values.items()})
        for logger in trainer.loggers:  # log_dict would repeat them in all later rows
            logger.log_metrics(values, step=trainer.global_step - 1)
        self._restart(trainer)

    def _restart(self, trainer: pl.Trainer) -> None:
        self._images, self._started, self._waited = 0, time.monotonic(), seconds_waited(trainer)


def seconds_waited(trainer: pl.Trainer) -> float:
    """Seconds this rank has waited for data so far."""
    return float(getattr(cast(Any, trainer).datamodule, "data_wait_seconds", 0.0))
