"""Measures how far the student has drifted from the frozen network that it is held to."""

from __future__ import annotations

from typing import Any, cast

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor

from dino_lite.backbones.blocks import evaluating
from dino_lite.callbacks.online_eval import clean_data, in_memory
from dino_lite.callbacks.progress import turns
from dino_lite.data.subset import Subset, spread
from dino_lite.eval.features import device_of, dtype_of
from dino_lite.losses.gram import regrid
from dino_lite.settings.kinds import Share, Size
from dino_lite.settings.validate import checked


class Drift(pl.Callback):
    """Logs `drift` and `drift_patches`: the mean cosine distance of the student's class tokens, and
    of its patches, to those of the run's frozen start, of at most `max_images` training images
    without augmentation.

    Both networks are in eval mode, so that neither drop path nor masks count: the first row, before
    any step, is exactly zero. Logged again every `every` (a fraction of the run) and at the end, by
    rank 0; nothing is logged in a run without a frozen start.
    """

    @checked
    def __init__(self, every: Share = 0.1, max_images: Size = 256) -> None:
        self.every, self.max_images = every, max_images
        self._turn, self._logged_at = 0, -1
        self._source: Any = None  # the images, in memory

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure the start, unless the run is resumed."""
        self._turn = turns(trainer, pl_module, self.every)
        if trainer.global_step == 0:
            self._log(trainer, pl_module)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Measure if it is due."""
        turn = turns(trainer, pl_module, self.every)
        if turn > self._turn:
            self._turn = turn
            self._log(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure the final weights."""
        self._log(trainer, pl_module)

    def _log(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        step, module = trainer.global_step, cast(Any, pl_module)
        done = step in (1, self._logged_at)  # the row of the first step is the start's
        if module.start is None or not trainer.is_global_zero or done:
            return
        self._logged_at = step
        values = self._measure(trainer, module)
        for logger in trainer.loggers:
            logger.log_metrics(values, step=max(0, step - 1))
            logger.save()

    def _measure(self, trainer: pl.Trainer, module: Any) -> dict[str, float]:
        data, student = clean_data(trainer), module.method.student.backbone
        # A data loader draws a seed from the global generator, which must not affect training.
        with torch.random.fork_rng(devices=[]), torch.no_grad(), evaluating(student):
            if self._source is None:
                train = cast(Any, trainer).datamodule.splits.train
                some = Subset(train, spread(len(train), self.max_images))
                self._source = in_memory(some, data)
            of_cls, of_patches = [], []
            for images, _ in data.batches(self._source, device_of(student), dtype_of(student)):
                mine, start = student(images), module.start(images)
                theirs = regrid(start.patches, start.grid, mine.grid)
                if mine.cls.shape == start.cls.shape:
                    of_cls.append(_distance(mine.cls, start.cls))
                if mine.patches.shape == theirs.shape:
                    of_patches.append(_distance(mine.patches, theirs).mean(1))
        found = {"drift": of_cls, "drift_patches": of_patches}
        return {name: float(torch.cat(parts).mean()) for name, parts in found.items() if parts}


def _distance(a: Tensor, b: Tensor) -> Tensor:
    """1 − cos as half the squared distance of the unit vectors: exactly zero of equal vectors."""
    turned = F.normalize(a.float(), dim=-1) - F.normalize(b.float(), dim=-1)
    return turned.square().sum(-1) / 2
