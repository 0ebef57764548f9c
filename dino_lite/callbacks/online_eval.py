"""How good the teacher's features have become, asked now and then of the training images alone."""

from __future__ import annotations

import math
import time
from typing import Annotated, Any, cast

import pytorch_lightning as pl
import torch

from dino_lite.callbacks.progress import run_fraction
from dino_lite.contracts import Backbone, Source
from dino_lite.data.clean import CleanData
from dino_lite.data.sources import ArraySource
from dino_lite.data.subset import Subset, spread
from dino_lite.distributed import broadcast_value
from dino_lite.eval.collapse import rankme, relative_std
from dino_lite.eval.features import Features, device_of, extract
from dino_lite.eval.knn import knn_accuracy
from dino_lite.eval.ridge import ridge_correct
from dino_lite.settings.kinds import Positive, Share, Size, whole
from dino_lite.settings.validate import checked

_BATCH_SIZE = 256  # images at once through the backbone, without gradient
_MOST_BYTES = 2**30  # of clean images held between two evaluations


class OnlineEval(pl.Callback):
    """Logs what the teacher's features of at most `max_images` clean training images are worth.

    With labels `knn`, top-1 in percent of a leave-one-out weighted k-NN, and `probe`, of a linear
    classifier as `eval.ridge` has it; always `rankme` and `feature_std` of `eval.health`. Times
    are `features_seconds`, `knn_seconds`, `probe_seconds`. Asked each `every` (a fraction of the
    run), or where that is given each `every_n_steps` optimizer steps, and at the end. The images
    are spread over the set; test images are never read, so that best.ckpt may be chosen by `knn`.
    Rank 0 computes, the others wait.
    """

    @checked
    def __init__(
        self,
        every: Share = 0.1,
        every_n_steps: Size | None = None,
        max_images: Annotated[int, whole(2)] = 5000,
        k: Size = 20,
        temperature: Positive = 0.07,
    ) -> None:
        self.every, self.every_n_steps, self.max_images = every, every_n_steps, max_images
        self.k, self.temperature = k, temperature
        self._turn = 0  # how many times `every` has passed
        self._asked_at = -1  # step of the last evaluation
        self._source: Source | None = None  # the same images each time, decoded once if they fit

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin to count where the run stands: it may go on from a checkpoint."""
        self._turn = self._turns(trainer, pl_module)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Evaluate where it is time; all ranks see the same step and fraction."""
        turn = self._turns(trainer, pl_module)
        if turn > self._turn:
            self._turn = turn
            self._evaluate(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The last figure belongs to the last weights."""
        if trainer.global_step > 0:
            self._evaluate(trainer, pl_module)

    def _turns(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> int:
        if self.every_n_steps is not None:
            return trainer.global_step // self.every_n_steps
        return math.floor(run_fraction(trainer, pl_module) / self.every + 1e-9)

    def _evaluate(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        step, source = trainer.global_step, cast(Any, trainer).datamodule.splits.train
        if step == self._asked_at:
            return
        self._asked_at = step
        values: dict[str, float] = {}
        if trainer.is_global_zero:
            backbone = cast(Any, pl_module).method.export_backbone()
            # A data loader draws a seed from the global generator, which belongs to the training.
            with torch.random.fork_rng(devices=[]):
                started = time.monotonic()
                bank = self.features(backbone, clean_data(trainer), source)
                seconds = time.monotonic() - started
            values = {"features_seconds": seconds} | self.measure(bank, device_of(backbone))
        if source.labels is not None:  # the other ranks wait here
            knn = broadcast_value(values.get("knn", math.nan), pl_module.device)
            trainer.callback_metrics["knn"] = torch.tensor(knn, dtype=torch.float64)
        for logger in trainer.loggers:
            logger.log_metrics(values, step=step - 1)  # the row of the step just done
            logger.save()

    def features(self, backbone: Backbone, data: CleanData, source: Source) -> Features:
        """Of the same images each time, decoded once if they fit."""
        if self._source is None:
            some = Subset(source, spread(len(source), self.max_images))
            fits = len(some) * len(data.normalize.mean) * data.size**2 <= _MOST_BYTES
            self._source = in_memory(some, data) if fits else some
        return extract(backbone, data, self._source, device_of(backbone))

    def measure(self, bank: Features, device: torch.device) -> dict[str, float]:
        """The numbers; no rank where features are not finite, k-NN and probe then NaN. Neither of
        them without labels, NaN with fewer than two classes.
        """
        values: dict[str, float] = {}
        finite = bool(torch.isfinite(bank.features).all())
        if finite:
            values = {"rankme": rankme(bank.features), "feature_std": relative_std(bank.features)}
        if not bool((bank.labels >= 0).any()):
            return values
        bank = bank.labeled()
        if bank.num_classes < 2 or not finite:
            return values | {"knn": math.nan, "probe": math.nan}
        k, started = min(self.k, len(bank.labels) - 1), time.monotonic()
        found = knn_accuracy(bank, bank, [k], self.temperature, leave_one_out=True, device=device)
        probed_at = time.monotonic()
        values["probe"] = float(100.0 * ridge_correct(bank).double().mean())
        seconds = {
            "knn_seconds": probed_at - started,
            "probe_seconds": time.monotonic() - probed_at,
        }
        return values | {"knn": found[k].top1} | seconds


def clean_data(trainer: pl.Trainer) -> CleanData:
    """The run's data as an evaluation sees it, at the size of the global crops."""
    data = cast(Any, trainer).datamodule
    return CleanData(
        data.splits, data.multi_crop.global_size, data.normalize, _BATCH_SIZE, data.num_workers
    )


def in_memory(source: Source, data: CleanData) -> ArraySource:
    """The readable images of a source as `data` sees them: decoding may cost more than features."""
    batches = list(data.read(source))
    images = torch.cat([batch.images for batch in batches]).permute(0, 2, 3, 1).contiguous()
    labels = torch.cat([batch.labels for batch in batches]).numpy()
    return ArraySource(images, labels, source.classes, "online evaluation")
