"""Training data for Lightning: from a source and the step the run is at to crops on the device."""

from __future__ import annotations

import csv
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytorch_lightning as pl
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from dino_lite.contracts import Crops, Source, Splits, UserError
from dino_lite.data.crops import MultiCrop
from dino_lite.data.photometric import Normalize
from dino_lite.data.sampler import PositionSampler

try:
    import fcntl
except ImportError:  # Windows, where the ranks of a run do not share a bad_files.csv at once
    fcntl = None  # type: ignore[assignment]


class Part(NamedTuple):
    """What a worker delivers: the crops of ≤ 64 images and what it could not read on the way.

    `crops` is None where the worker gave up: it alone met more bad images than are allowed.
    """

    crops: Crops | None
    bad: list[tuple[int, str]]


class CropData(Dataset[Part]):
    """Reads and crops the images of a part, in a worker or in process.

    An image that cannot be read is replaced by the next readable one of the source. The crops stay
    keyed by the index that was asked for, so the replacement is not seen twice alike in one epoch;
    `Crops.index` and the label are the replacement's.
    """

    def __init__(self, source: Source, multi_crop: MultiCrop, max_bad: int) -> None:
        self.source, self.multi_crop, self.max_bad = source, multi_crop, max_bad
        self.bad: dict[int, str] = {}  # read once, in vain; a worker remembers its own

    def __getitems__(self, pairs: Sequence[tuple[int, int]]) -> Part:
        known = len(self.bad)
        images, read = [], []
        for _, index in pairs:
            found = self._read(index)
            if found is None:
                return Part(None, list(self.bad.items()))
            images.append(found[0])
            read.append(found[1])
        epochs, asked = np.array(pairs).T
        shown = np.array(read)
        labels = None if self.source.labels is None else self.source.labels[shown]
        crops = self.multi_crop(images, epochs, asked)._replace(
            index=torch.from_numpy(shown),
            labels=None if labels is None else torch.from_numpy(labels.astype(np.int64)),
        )
        return Part(crops, list(self.bad.items())[known:])

    def _read(self, index: int) -> tuple[Image.Image, int] | None:
        """The first readable image from `index` on, and its index; None beyond `max_bad`."""
        while len(self.bad) <= self.max_bad:
            if index not in self.bad:
                try:
                    return self.source.read(index), index
                except (OSError, ValueError) as error:
                    self.bad[index] = str(error)
            index = (index + 1) % len(self.source)
        return None


class BadFiles:
    """Counts the distinct images this rank could not read, lists them in a CSV, stops a run.

    Errors: UserError when they are more than `max_fraction` of the source, or all of it.
    """

    def __init__(self, source: Source, max_fraction: float, path: Path | None) -> None:
        self.source, self.max_fraction, self.path = source, max_fraction, path
        self.reasons: dict[int, str] = {}

    @property
    def allowed(self) -> int:
        """The most bad images a run goes on with; one is always needed."""
        return min(int(self.max_fraction * len(self.source)), len(self.source) - 1)

    def add(self, found: Iterable[tuple[int, str]]) -> None:
        """Note what a worker reported."""
        new = {index: reason for index, reason in found if index not in self.reasons}
        if not new:
            return
        self.reasons |= new
        if self.path is not None:
            rows = [(self.source.name(index), reason) for index, reason in new.items()]
            append_rows(self.path, ("path", "reason"), rows)
        if len(self.reasons) > self.allowed:
            self._stop()

    def _stop(self) -> None:
        total, num_bad = len(self.source), len(self.reasons)
        if num_bad == total:
            what = f"None of the {total} images can be read"
        else:
            what = f"{num_bad} of the {total} images cannot be read, more than "
            what += f"loader.max_bad_fraction={self.max_fraction:g} allows"
        index, reason = next(iter(self.reasons.items()))
        listed = "" if self.path is None else f" (all in {self.path})"
        raise UserError(
            f"{what}, the first being {self.source.name(index)}: {reason}{listed}; "
            "mend or remove them."
        )


def append_rows(path: Path, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Add the rows whose first cell the CSV does not have yet; processes may do so at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+", newline="", encoding="utf-8", errors="surrogateescape") as file:
        if fcntl is not None:
            with suppress(OSError):  # some network file systems have no locks
                fcntl.flock(file, fcntl.LOCK_EX)  # until the file is closed
        file.seek(0)
        known = {row[0] for row in csv.reader(file) if row}
        writer = csv.writer(file)
        if not known:
            writer.writerow(header)
        writer.writerows(row for row in rows if row[0] not in known)


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
    the precision of the run. `num_steps` None: endless (runs that end by the clock).
    """

    def __init__(
        self,
        splits: Splits,
        multi_crop: MultiCrop,
        normalize: Normalize,
        batch_size: int,
        num_workers: int = 0,
        seed: int = 0,
        max_bad_fraction: float = 0.05,
        num_steps: int | None = None,
        bad_files: Path | None = None,
    ) -> None:
        super().__init__()
        if num_workers < 0:
            raise UserError(f"loader.num_workers is {num_workers}, but must be 0 or more.")
        if not 0 <= max_bad_fraction <= 1:
            raise UserError(
                f"loader.max_bad_fraction is {max_bad_fraction}, but must lie in [0, 1]."
            )
        self.splits, self.multi_crop, self.normalize = splits, multi_crop, normalize
        self.batch_size, self.num_workers, self.seed = batch_size, num_workers, seed
        self.num_steps = num_steps
        self.dtype = torch.float32
        self.bad_files = BadFiles(splits.train, max_bad_fraction, bad_files)
        self._loader: StepLoader | None = None

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
        )
        on_cuda = trainer is not None and trainer.strategy.root_device.type == "cuda"
        loader = DataLoader(
            CropData(self.splits.train, self.multi_crop, self.bad_files.allowed),
            batch_sampler=sampler,
            num_workers=self.num_workers,
            collate_fn=_as_cropped,
            pin_memory=on_cuda,
        )
        # A run is one pass over this: its workers live as long as it without being persistent.
        self._loader = StepLoader(loader, sampler, self.bad_files, self._current_step)
        return self._loader

    def on_after_batch_transfer(self, batch: list[Crops], dataloader_idx: int) -> Crops:
        """Join the parts and normalize them, on the device."""
        return self.normalize.crops(join(batch), self.dtype)

    def _current_step(self) -> int:
        return 0 if self.trainer is None else self.trainer.global_step


def join(parts: Sequence[Crops]) -> Crops:
    """One Crops of the images of all parts, in order."""
    if len(parts) == 1:
        return parts[0]

    def along(dim: int, field: str) -> Any:  # a Tensor, or None where the parts have none
        tensors = [getattr(part, field) for part in parts]
        return None if tensors[0] is None else torch.cat(tensors, dim)

    return Crops(
        globals_=along(1, "globals_"),
        locals_=along(1, "locals_"),
        index=along(0, "index"),
        labels=along(0, "labels"),
        boxes=along(1, "boxes"),
        draws=along(1, "draws"),
        masks=along(1, "masks"),
        extra={name: torch.cat([p.extra[name] for p in parts], 1) for name in parts[0].extra},
    )


def _as_cropped(part: Any) -> Any:
    """Keep the DataLoader from stacking what `__getitems__` has put together."""
    return part
