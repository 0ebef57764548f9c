"""Estimates the time and memory of a run from its first steps, and prints them once."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, NamedTuple, cast

import pytorch_lightning as pl
import torch
from tqdm import tqdm  # type: ignore[import-untyped]

from dino_lite.callbacks.throughput import seconds_waited
from dino_lite.contracts import Crops

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]


class Measured(NamedTuple):
    """Prediction for a whole run from its first steps; JSON-serializable as a dict.

    Predicts `seconds` if the run is limited by steps, `steps` and `epochs` if it is limited by
    time. `data_wait` is the fraction of time that rank 0 waited for data, `memory` the peak of its
    device, or of its process on a CPU, in bytes. If any losses are `inactive`, later steps take
    longer.
    """

    device: str
    num_devices: int
    timed: bool
    steps: int
    epochs: float
    seconds: float
    images_per_second: float  # of all devices
    data_wait: float
    memory: int | None
    inactive: list[str]
    measured_at: tuple[int, float]  # step and seconds of training

    def line(self) -> str:
        """The estimate as one line of text."""
        steps, epochs = _plural(self.steps, "step"), _plural(self.epochs, "epoch")
        if self.timed:
            most = "at most " if self.inactive else ""
            length = f"{_duration(self.seconds)} are {most}{steps}, {epochs}"
        else:
            least = "at least " if self.inactive else ""
            length = f"{epochs}, {steps} take {least}{_duration(self.seconds)}"
        device = f"{self.num_devices} × {self.device}" if self.num_devices > 1 else self.device
        each = " each" if self.num_devices > 1 else ""
        parts = [
            f"estimate: {length} at {_round(self.images_per_second)} images/s",
            f"{100 * self.data_wait:.0f} % of the time waiting for data",
            "" if self.memory is None else f"{_size(self.memory)} of memory{each} on {device}",
            f"not active yet: loss.{', loss.'.join(self.inactive)}" if self.inactive else "",
        ]
        return ", ".join(filter(None, parts))


class Estimate(pl.Callback):
    """Prints one line on rank 0 as soon as the run's clock has measured the time per step: the
    duration of the run (or how many steps fit into its time), its speed and its memory. The same
    numbers are kept in `results`. Evaluations and checkpoints are not included in the time.
    """

    def __init__(self) -> None:
        self.results: dict[str, Any] = {}
        self._waited = 0.0

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Crops,
        batch_idx: int,
    ) -> None:
        """Print once enough steps have been measured."""
        clock = cast(Any, pl_module).clock
        if self.results or not trainer.is_global_zero:
            return
        if clock.warm_since is None or clock.warm_since[0] == trainer.global_step - 1:
            self._waited = seconds_waited(trainer)
        elif clock.seconds_per_step is not None:
            measured = self._measure(trainer, pl_module, batch.num_images)
            self.results = {"estimate": measured._asdict()}
            tqdm.write(f"{measured.line()}\n", file=sys.stdout)
            sys.stdout.flush()

    def _measure(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, num_images: int
    ) -> Measured:
        module = cast(Any, pl_module)
        clock, device = module.clock, pl_module.device
        step, each = trainer.global_step - 1, clock.seconds_per_step  # measured at the step's start
        left, spent = clock.seconds_left(step), clock.seconds - clock.warm_since[1]
        steps = clock.num_steps or step + round(left / each)
        on_cuda = device.type == "cuda"
        return Measured(
            device=torch.cuda.get_device_name(device) if on_cuda else device.type,
            num_devices=trainer.world_size,
            timed=clock.max_seconds is not None,
            steps=steps,
            epochs=steps / clock.steps_per_epoch,
            seconds=clock.max_seconds or clock.seconds + left,
            images_per_second=num_images * trainer.world_size / each,
            data_wait=min(1.0, (seconds_waited(trainer) - self._waited) / spent),
            memory=peak_memory(device),
            inactive=module.inactive_losses(),
            measured_at=(step, clock.seconds),
        )


def peak_memory(device: torch.device) -> int | None:
    """Peak memory in bytes: on a GPU as allocated by torch on `device`, else the resident memory of
    this process without its workers; None if the system does not report it.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):  # not Linux
        return None if resource is None else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _plural(count: float, noun: str) -> str:
    text = f"{count:,}" if isinstance(count, int) else _round(count)
    return f"{text} {noun}" if text == "1" else f"{text} {noun}s"


def _duration(seconds: float) -> str:
    """Seconds as text: 40 s, 25 min, 31 h, 12 days."""
    for unit, name, most in ((1, "s", 100), (60, "min", 100), (3600, "h", 72)):
        if seconds < most * unit:
            return f"{_round(seconds / unit)} {name}"
    return f"{_round(seconds / 86_400)} days"


def _size(num_bytes: float) -> str:
    """Bytes in MiB or GiB, with two significant digits."""
    if num_bytes < 2**30:
        return f"{_round(num_bytes / 2**20)} MiB"
    return f"{_round(num_bytes / 2**30)} GiB"


def _round(value: float) -> str:
    """Two significant digits: 0.34, 5.1, 12,000; whole numbers below 1,000 are not rounded."""
    if value == int(value) and value < 1000:
        return f"{value:.0f}"
    digits = float(f"{value:.2g}")
    return f"{digits:,.0f}" if digits >= 10 else f"{digits:g}"
