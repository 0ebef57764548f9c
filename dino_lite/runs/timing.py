"""Measures the throughput of data loading and of training, for a few seconds each."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from dino_lite.contracts import Crops, UserError
from dino_lite.data.datamodule import DataModule
from dino_lite.methods.module import PretrainModule
from dino_lite.wording import count


class Loading(NamedTuple):
    """Throughput of a single process without workers, and one of the batches it loaded."""

    images_per_second: float
    batch: Any
    batch_size: int


class Training(NamedTuple):
    """Seconds per step of one device on its whole batch; `largest` is the largest batch that fitted
    its memory, None if the whole batch does.
    """

    seconds_per_step: float
    largest: int | None


def time_loading(datamodule: DataModule, seconds: float = 2.0) -> Loading:
    """Load and crop batches in this process, as a worker would, after a warm-up batch.

    `datamodule` must have no workers, and should have a small batch. Raises as its loader does.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in a worker
    batches: Iterator[Any] = iter(datamodule.train_dataloader())
    try:
        next(batches)
        num_batches, spent, started = 0, 0.0, time.perf_counter()
        while not num_batches or spent < seconds:
            batch = next(batches)
            num_batches, spent = num_batches + 1, time.perf_counter() - started
    finally:
        torch.set_num_threads(threads)
    size = datamodule.batch_size
    return Loading(num_batches * size / spent, batch, size)


def time_training(
    datamodule: DataModule,
    module: PretrainModule,
    loaded: Loading,
    batch_size: int,
    device: torch.device,
    longest: float = 1.0,
) -> Training:
    """Time optimizer steps on 2, 4, 8 … up to `batch_size` images, the device's share of a batch.

    Once a step takes `longest` seconds, the time of the whole batch is extrapolated from the last
    two sizes: a step has a fixed cost (optimizer, teacher) and one that is linear in the images.
    Moves the method to `device` and trains it: discard it afterwards. Raises UserError if not even
    the smallest batch fits the device's memory.
    """
    module.method.to(device)
    step = module.bare_step()
    at = module.clock.at(0, device)

    def seconds(size: int) -> float:
        raw = [*loaded.batch] * math.ceil(size / loaded.batch_size)
        raw = datamodule.transfer_batch_to_device(raw, device, 0)
        wait_for(device)
        started = time.perf_counter()
        crops: Crops = datamodule.on_after_batch_transfer(raw, 0)
        step(crops.part(0, size), at)
        wait_for(device)
        return time.perf_counter() - started

    size, before, timed = min(2, batch_size), (0, 0.0), 0
    while True:
        try:
            if not timed:
                seconds(size)  # warm-up: allocates memory and the optimizer's state
            timed += 1
            spent = seconds(size)
            spent = spent if spent > longest else min(spent, seconds(size))
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if not before[0]:
                raise UserError(
                    f"{count(size, 'image')} at once: too many for the memory of {device}; choose "
                    "a smaller backbone."
                ) from None
            torch.cuda.empty_cache()
            return Training(_extrapolate((0, 0.0), before, batch_size), before[0])
        if size == batch_size:
            return Training(spent, None)
        if spent > longest and (before[0] or spent > 10 * longest):
            return Training(_extrapolate(before, (size, spent), batch_size), None)
        size, before = min(2 * size, batch_size), (size, spent)


def compare(
    loading: Loading,
    training: Training,
    *,
    batch_size: int,
    num_devices: int,
    num_workers: int,
    num_cores: int,
    num_images: int,
    num_epochs: float | None,
) -> dict[str, Any]:
    """Images/s of loading, of training and of a run, and the run's length in seconds.

    `batch_size` is per device; `num_workers` and `num_cores` are totals over all devices. Returns
    plain JSON.
    """
    one = loading.images_per_second
    trains = num_devices * batch_size / training.seconds_per_step
    feeds = one * (min(num_workers, num_cores) or num_devices)
    # Without workers, the training process alternates between loading and training.
    together = min(feeds, trains) if num_workers else 1 / (1 / feeds + 1 / trains)
    epoch = num_images / together
    return {
        "loading": {
            "images_per_second": round(feeds, 1),
            "images_per_second_of_one": round(one, 1),
            "num_workers": num_workers,
            "num_workers_wanted": math.ceil(trains / one),
            "num_cores": num_cores,
        },
        "training": {
            "images_per_second": round(trains, 1),
            "seconds_per_step": round(training.seconds_per_step, 4),
            "largest_batch": training.largest,
        },
        "batch_size_per_device": batch_size,
        "images_per_second": round(together, 1),
        "bottleneck": "loading" if feeds < trains else "training",
        "seconds_per_epoch": round(epoch, 1),
        "seconds_per_run": None if num_epochs is None else round(epoch * num_epochs, 1),
    }


def _extrapolate(before: tuple[int, float], last: tuple[int, float], size: int) -> float:
    """Seconds for `size` images, extrapolated linearly from two smaller (images, seconds).

    The slope is bounded by the time per image of the larger batch and half of that, since each is
    timed only once.
    """
    mean = last[1] / max(last[0], 1)
    slope = (last[1] - before[1]) / max(last[0] - before[0], 1)
    return last[1] + (size - last[0]) * min(mean, max(mean / 2, slope))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` is an out-of-memory error of torch or Python, on any device."""
    words = ("out of memory", "can't allocate memory", "not enough memory", "ALLOC_FAILED")
    known = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return known or any(word in str(error) for word in words)


def wait_for(device: torch.device) -> None:
    """Synchronize with the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
