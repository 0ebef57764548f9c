"""Evaluates the teacher's features at intervals during training, on training images only."""

from __future__ import annotations

import math
import sys
import time
from typing import Annotated, Any, cast

import pytorch_lightning as pl
import torch
from jaxtyping import Int
from torch import Tensor
from tqdm import tqdm  # type: ignore[import-untyped]

from dino_lite.callbacks.progress import turns
from dino_lite.contracts import Backbone, Source, UserError
from dino_lite.data.clean import CleanData, preprocessing_of
from dino_lite.data.sources import ArraySource
from dino_lite.data.subset import Subset, spread
from dino_lite.distributed import broadcast_value
from dino_lite.eval.agreement import Standing, learned_mistakes
from dino_lite.eval.collapse import rankme, relative_std
from dino_lite.eval.features import Features, device_of, extract
from dino_lite.eval.knn import knn_answers, knn_predict
from dino_lite.eval.results import percent
from dino_lite.eval.ridge import ridge_correct
from dino_lite.methods.frozen import FrozenTeacher
from dino_lite.settings.kinds import Positive, Share, Size, whole
from dino_lite.settings.validate import checked
from dino_lite.wording import count

_BATCH_SIZE = 256  # images per forward pass, without gradients
_MOST_BYTES = 2**30  # of decoded images kept between evaluations


class OnlineEval(pl.Callback):
    """Logs metrics of the teacher's features of at most `max_images` training images, without
    augmentation.

    With labels: `knn`, top-1 in percent of a leave-one-out weighted k-NN, and `probe`, top-1 of
    the linear classifier of `eval.ridge`. Always: `rankme` and `feature_std` (`eval.collapse`).
    With several students each has its own, "STUDENT/knn"; those without a name are the first one's.
    Of a distillation with labels also `knn_agreement`: the percent of images for which k-NN of the
    student's and of the frozen teacher's features predict the same class. If it rises while `knn`
    falls, compared with the best `knn` so far (`eval.agreement`), that is printed once for each
    student and kept in `warnings`.
    Times are `features_seconds`, `knn_seconds`, `probe_seconds`. Runs every `every` (a fraction of
    the run), or every `every_n_steps` optimizer steps if given, and at the end. The images are
    spaced evenly over the set. Test images are never read, so best.ckpt may be selected by `knn`.
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
        self._turn = 0  # intervals passed so far
        self._asked_at = -1  # step of the last evaluation
        self._source: Source | None = None  # the evaluated images, in memory if they fit
        self.warnings: list[dict[str, Any]] = []  # kind, step, text
        self._best: dict[str, Standing] = {}  # by student, the best k-NN so far
        self._taught: Int[Tensor, "N"] | None = None  # what k-NN of the teacher predicts

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Count from the current step: the run may be resumed."""
        self._turn = self._turns(trainer, pl_module)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Evaluate if due; all ranks see the same step and fraction."""
        turn = self._turns(trainer, pl_module)
        if turn > self._turn:
            self._turn = turn
            self._evaluate(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Evaluate the final weights."""
        if trainer.global_step > 0:
            self._evaluate(trainer, pl_module)

    def _turns(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> int:
        if self.every_n_steps is not None:
            return trainer.global_step // self.every_n_steps
        return turns(trainer, pl_module, self.every)

    def _evaluate(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        step, source = trainer.global_step, cast(Any, trainer).datamodule.splits.train
        if step == self._asked_at:
            return
        self._asked_at = step
        values: dict[str, float] = {}
        if trainer.is_global_zero:
            method, data = cast(Any, pl_module).method, clean_data(trainer)
            for name, backbone in method.export_backbones().items():
                found = self._measured(backbone, data, source, getattr(method, "teacher", None))
                self._watch(name, step, found)
                values = values or found  # without a name: those of the first student
                values |= {f"{name}/{key}": value for key, value in found.items() if name}
        if source.labels is not None:  # the other ranks wait here
            knn = broadcast_value(values.get("knn", math.nan), pl_module.device)
            trainer.callback_metrics["knn"] = torch.tensor(knn, dtype=torch.float64)
        for logger in trainer.loggers:
            logger.log_metrics(values, step=step - 1)  # the row of the step just completed
            logger.save()

    def _measured(
        self, backbone: Backbone, data: CleanData, source: Source, teacher: FrozenTeacher | None
    ) -> dict[str, float]:
        device = device_of(backbone)
        # A data loader draws a seed from the global generator, which must not affect training.
        with torch.random.fork_rng(devices=[]):
            started = time.monotonic()
            bank = self.features(backbone, data, source)
            seconds = time.monotonic() - started
            if self._taught is None and teacher is not None and bank.labeled().num_classes > 1:
                self._taught = self._predicted(self._of(teacher, data, device), device)
        return {"features_seconds": seconds} | self.measure(bank, device, self._taught)

    def _of(self, teacher: FrozenTeacher, data: CleanData, device: torch.device) -> Features:
        """The frozen teacher's features of the same images."""
        assert self._source is not None
        rows, labels = [], []
        for images, known in data.batches(self._source, device):
            rows.append(teacher(images, cls_only=True).cls.float().cpu())
            labels.append(known.cpu())
        return Features(torch.cat(rows), torch.cat(labels)).labeled()

    def _predicted(self, bank: Features, device: torch.device) -> Int[Tensor, "N"]:
        k = min(self.k, len(bank.labels) - 1)
        return knn_predict(bank, bank, k, self.temperature, leave_one_out=True, device=device)

    def _watch(self, student: str, step: int, found: dict[str, float]) -> None:
        """Warn once if the student, compared with its best, copies its teacher's mistakes."""
        if "knn_agreement" not in found:
            return
        assert self._taught is not None
        now = Standing(f"step {step:,}", found["knn"], found["knn_agreement"], len(self._taught))
        best = self._best.setdefault(student, now)
        if now.accuracy >= best.accuracy:
            self._best[student] = now
        kind = f"mistakes_{student}"
        told = learned_mistakes([best, now])
        if told and kind not in {warning["kind"] for warning in self.warnings}:
            text = f"{student}: {told[0]}" if student else told[0]
            self.warnings.append({"kind": kind, "step": step, "text": text})
            tqdm.write(f"warning: {text}", file=sys.stderr)

    def features(self, backbone: Backbone, data: CleanData, source: Source) -> Features:
        """Features of the same images each time, decoded once if they fit in memory."""
        if self._source is None:
            some = Subset(source, spread(len(source), self.max_images))
            channels = len(data.preprocessing.mean)
            fits = len(some) * channels * math.prod(data.preprocessing.size) <= _MOST_BYTES
            self._source = in_memory(some, data) if fits else some
        return extract(backbone, data, self._source, device_of(backbone))

    def measure(
        self, bank: Features, device: torch.device, taught: Int[Tensor, "N"] | None = None
    ) -> dict[str, float]:
        """The metrics. If features are not finite, `rankme` and `feature_std` are absent, and `knn`
        and `probe` NaN. The latter two are absent without labels, NaN with fewer than two classes.
        `taught` are the classes that a teacher predicts for the labeled images.
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
        found = knn_answers(bank, bank, [k], self.temperature, leave_one_out=True, device=device)[k]
        probed_at = time.monotonic()
        values["probe"] = float(100.0 * ridge_correct(bank).double().mean())
        seconds = {
            "knn_seconds": probed_at - started,
            "probe_seconds": time.monotonic() - probed_at,
        }
        if taught is not None:
            values["knn_agreement"] = float(percent(found.predicted == taught).mean())
        return values | {"knn": found.accuracy(k).top1} | seconds


def clean_data(trainer: pl.Trainer) -> CleanData:
    """The run's data without augmentation, at the size of the global crops."""
    data = cast(Any, trainer).datamodule
    how = preprocessing_of(data.multi_crop.global_size, data.normalize)
    return CleanData(data.splits, how, _BATCH_SIZE, data.num_workers)


def in_memory(source: Source, data: CleanData) -> ArraySource:
    """The readable images of a source, preprocessed as `data` does, in memory: decoding may cost
    more than extracting features.
    """
    batches = list(data.read(source))
    if not batches:
        raise UserError(
            f"None of the {count(len(source), 'image')} of {data.splits.name} can be read."
        )
    images = torch.cat([batch.images for batch in batches]).permute(0, 2, 3, 1).contiguous()
    labels = torch.cat([batch.labels for batch in batches]).numpy()
    return ArraySource(images, labels, source.classes, "online evaluation")
