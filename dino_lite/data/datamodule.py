"""Lightning's data module: from a source and the current step to crops on the device."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dino_lite.contracts import Crops, Splits
from dino_lite.data import exact, resample
from dino_lite.data.crops import MultiCrop
from dino_lite.data.mixture import images_in_memory
from dino_lite.data.parts import BadFiles, CropData, DrawData, Part, Pixels, join
from dino_lite.data.photometric import Normalize, photometric
from dino_lite.data.sampler import PositionSampler
from dino_lite.data.workers import worker_context
from dino_lite.settings.kinds import Count, Fraction, Size
from dino_lite.settings.validate import checked

# Pixels. For larger images, resampling by matrices costs more than it saves.
MAX_WHOLE_SIDE = 64


class StepLoader:
    """Yields the parts of one step at a time, from the current step of the run to the last.

    `len` counts all steps of the run, including those done: Lightning compares it with the batches
    it has counted, which a resumed run continues.
    """

    def __init__(
        self,
        loader: DataLoader[Part],
        sampler: PositionSampler,
        bad_files: BadFiles,
        start: Callable[[], int],
    ) -> None:
        self.loader, self.sampler, self.bad_files, self.start = loader, sampler, bad_files, start
        self.data_wait_seconds = (
            0.0  # time the run waited for data; with 0 workers, all loading time
        )

    def __len__(self) -> int:
        if self.sampler.num_steps is None:
            raise TypeError("an endless loader has no length")
        return self.sampler.num_steps

    def __iter__(self) -> Iterator[list[Crops]]:
        self.sampler.start_step = self.start()
        started = time.perf_counter()
        parts = iter(self.loader)
        try:
            for _ in self.sampler.steps():
                batch = [self._checked(next(parts)) for _ in range(self.sampler.parts_per_step)]
                self.data_wait_seconds += time.perf_counter() - started
                yield batch
                started = time.perf_counter()
        finally:
            del parts  # the only reference: workers stop here, also on an error

    def _checked(self, part: Part) -> Crops:
        self.bad_files.add(part.bad)
        assert part.crops is not None, "a worker gives up on more bad images than add() accepts"
        return part.crops

    # Lightning resumes within an epoch only if the loader is stateful; here, the step is the state.

    def state_dict(self) -> dict[str, Any]:
        """Empty: the step is the only state."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Does nothing: `start` gives the step."""


class DataModule(pl.LightningDataModule):
    """Training data of a run: order and crops are functions of seed and step only.

    `batch_size` is images per step over all ranks. `dtype` of the crops on the device should be the
    run's precision. `num_steps` None: endless (runs limited by time). `draft`: large JPEGs are
    decoded at the scale the smallest crop needs. If crops are made on the device and all images are
    small and in memory, they are kept on the device as one tensor and cropped there.
    """

    @checked
    def __init__(
        self,
        splits: Splits,
        multi_crop: MultiCrop,
        normalize: Normalize,
        batch_size: Size,
        num_workers: Count = 0,
        seed: Count = 0,
        max_bad_fraction: Fraction = 0.05,
        num_steps: int | None = None,
        bad_files: Path | None = None,
        draft: bool = True,
    ) -> None:
        super().__init__()
        self.splits, self.multi_crop, self.normalize = splits, multi_crop, normalize
        self.batch_size, self.num_workers, self.seed = batch_size, num_workers, seed
        self.num_steps, self.draft = num_steps, draft
        self.dtype = torch.float32
        self.bad_files = BadFiles(splits.train, max_bad_fraction, bad_files)
        self._loader: StepLoader | None = None
        self._whole: Tensor | None = None  # all images, "N H W C", on the device
        if multi_crop.where == "device":
            self._whole = images_in_memory(splits.train, MAX_WHOLE_SIDE)

    @property
    def data_wait_seconds(self) -> float:
        """Seconds the run has waited for data."""
        return 0.0 if self._loader is None else self._loader.data_wait_seconds

    def train_dataloader(self) -> StepLoader:
        """Steps of this rank from the trainer's current step; from 0 without a trainer."""
        trainer = self.trainer
        sampler = PositionSampler(
            n=len(self.splits.train),
            batch_size=self.batch_size,
            rank=0 if trainer is None else trainer.global_rank,
            num_ranks=1 if trainer is None else trainer.world_size,
            seed=self.seed,
            num_steps=self.num_steps,
            groups=self.splits.train.groups,
            turns=self.splits.train.turns,
        )
        on_cuda = trainer is not None and trainer.strategy.root_device.type == "cuda"
        loader = DataLoader(
            self._parts(),
            batch_sampler=sampler,
            num_workers=self.num_workers,
            multiprocessing_context=worker_context(self.num_workers),
            collate_fn=_as_cropped,
            pin_memory=on_cuda,
        )
        # A run is one pass over this loader, so workers need not be persistent.
        self._loader = StepLoader(loader, sampler, self.bad_files, self._current_step)
        return self._loader

    def _parts(self) -> Dataset[Part]:
        """The data set that the workers read."""
        source, multi_crop = self.splits.train, self.multi_crop
        if self._whole is not None:
            return DrawData(self._whole.shape, source.labels, multi_crop)
        make: Pixels = resample.make_crops
        if multi_crop.where == "worker":
            make = partial(exact.make_crops, blur_kernel=multi_crop.blur_kernel)
        min_pixels = multi_crop.min_pixels if self.draft else None
        return CropData(source, multi_crop, make, self.bad_files.allowed, min_pixels)

    def on_after_batch_transfer(self, batch: list[Crops], dataloader_idx: int) -> Crops:
        """Concatenate, finish and normalize the parts: all at once on a device, one by one on the
        CPU, where each then stays in cache.
        """
        parts = batch if batch[0].index.is_cpu else [join(batch)]
        return join([self._finish(part) for part in parts])

    def _finish(self, crops: Crops) -> Crops:
        """Apply what the worker did not."""
        cut = self.multi_crop
        if self._whole is not None:
            self._whole = self._whole.to(crops.index.device)
            crops = resample.fill(crops, self._whole, cut.groups, cut.gram_size)
        if cut.where == "device":
            crops = photometric(crops, cut.turns, cut.blur_kernel)
        return self.normalize.crops(crops, self.dtype)

    def _current_step(self) -> int:
        return 0 if self.trainer is None else self.trainer.global_step


def _as_cropped(part: Any) -> Any:
    """Collate function: `__getitems__` already returns a batch."""
    return part
