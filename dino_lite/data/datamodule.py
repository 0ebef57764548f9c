"""Training data for Lightning: from a source and the step the run is at to crops on the device."""

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
from dino_lite.data.parts import BadFiles, CropData, DrawData, Part, Pixels, join
from dino_lite.data.photometric import Normalize, photometric
from dino_lite.data.sampler import PositionSampler
from dino_lite.data.sources import ArraySource
from dino_lite.settings.kinds import Count, Fraction, Size
from dino_lite.settings.validate import checked

# Pixels. Cutting crops out of larger images by matrices costs more than it saves.
MAX_WHOLE_SIDE = 64


class StepLoader:
    """Yields the parts of one step at a time, from the step the run is at to the last one.

    `len` counts all steps of the run, also those behind: Lightning holds it against the batches it
    has counted, of which a resumed run has some already.
    """

    def __init__(
        self,
        loader: DataLoader[Part],
        sampler: PositionSampler,
        bad_files: BadFiles,
        start: Callable[[], int],
    ) -> None:
        self.loader, self.sampler, self.bad_files, self.start = loader, sampler, bad_files, start
        self.data_wait_seconds = 0.0  # the run stood still for data: with 0 workers, all the work

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
            del parts  # the only reference: its workers end here, also when the run fails

    def _checked(self, part: Part) -> Crops:
        self.bad_files.add(part.bad)
        assert part.crops is not None, "a worker gives up on more bad images than add() accepts"
        return part.crops

    # Lightning resumes within an epoch only with a loader that has a state. This one's is the step.

    def state_dict(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to do: `start` knows."""


class DataModule(pl.LightningDataModule):
    """Feeds a run: order and crops are functions of seed and step, whatever reads them.

    `batch_size` is images per step over all ranks. `dtype` of the crops on the device: set it to
    the precision of the run. `num_steps` None: endless (runs that end by the clock). `draft`: large
    JPEGs are decoded at the scale that the smallest crop needs. Small images in memory whose crops
    are changed on the device lie there as one tensor, and their crops are cut out there too.
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
        source = splits.train
        if multi_crop.where == "device" and isinstance(source, ArraySource):
            side = max(source.images.shape[1:3])
            self._whole = source.images if side <= MAX_WHOLE_SIDE else None

    @property
    def data_wait_seconds(self) -> float:
        """How long the run has stood still for data."""
        return 0.0 if self._loader is None else self._loader.data_wait_seconds

    def train_dataloader(self) -> StepLoader:
        """Steps of this rank from the trainer's current one on; from 0 without a trainer."""
        trainer = self.trainer
        sampler = PositionSampler(
            n=len(self.splits.train),
            batch_size=self.batch_size,
            rank=0 if trainer is None else trainer.global_rank,
            num_ranks=1 if trainer is None else trainer.world_size,
            seed=self.seed,
            num_steps=self.num_steps,
            groups=self.splits.train.groups,
        )
        on_cuda = trainer is not None and trainer.strategy.root_device.type == "cuda"
        loader = DataLoader(
            self._parts(),
            batch_sampler=sampler,
            num_workers=self.num_workers,
            collate_fn=_as_cropped,
            pin_memory=on_cuda,
        )
        # A run is one pass over this: its workers live as long as it without being persistent.
        self._loader = StepLoader(loader, sampler, self.bad_files, self._current_step)
        return self._loader

    def _parts(self) -> Dataset[Part]:
        """What the workers do."""
        source, multi_crop = self.splits.train, self.multi_crop
        if self._whole is not None and isinstance(source, ArraySource):
            return DrawData(source, multi_crop)
        make: Pixels = resample.make_crops
        if multi_crop.where == "worker":
            make = partial(exact.make_crops, blur_kernel=multi_crop.blur_kernel)
        min_pixels = multi_crop.min_pixels if self.draft else None
        return CropData(source, multi_crop, make, self.bad_files.allowed, min_pixels)

    def on_after_batch_transfer(self, batch: list[Crops], dataloader_idx: int) -> Crops:
        """All parts as one batch, normalized, on the device; there as many at once as there are, on
        the CPU one by one: they then stay in its cache.
        """
        parts = batch if batch[0].index.is_cpu else [join(batch)]
        return join([self._finish(part) for part in parts])

    def _finish(self, crops: Crops) -> Crops:
        """What is left to do with the pixels after the worker."""
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
    """Keep the DataLoader from stacking what `__getitems__` has put together."""
    return part
