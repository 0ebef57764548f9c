"""Measures the overhead of a run's training loop over its bare step, both in one process."""

from __future__ import annotations

import contextlib
import io
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from step_process import Setup, build_ours, noise_crops, planned

from dino_lite.contracts import Crops, Progress
from dino_lite.runs.build import build
from dino_lite.runs.run import Run
from dino_lite.runs.timing import wait_for
from dino_lite.runs.trainer import build_trainer, quiet_lightning

_NOT_TIMED = ("online_eval", "pictures", "checkpoints")  # they run rarely


class Alternating:
    """A loader of prepared crops that runs a bare step before it yields a batch.

    This interleaves the two measurements: `bare` holds the seconds of these steps, `loop` those
    between yielding a batch and the request for the next.
    """

    def __init__(
        self, step: Callable[[Crops, int], Any], batches: list[Crops], num_steps: int
    ) -> None:
        self.step, self.batches, self.num_steps = step, batches, num_steps
        self.bare: list[float] = []
        self.loop: list[float] = []

    def __len__(self) -> int:
        return self.num_steps

    def __iter__(self) -> Iterator[Crops]:
        device = self.batches[0].index.device
        for number in range(self.num_steps):
            crops = self.batches[number % len(self.batches)]
            started = time.perf_counter()
            self.step(crops, number)
            wait_for(device)
            self.bare.append(time.perf_counter() - started)
            started = time.perf_counter()
            yield crops
            wait_for(device)
            self.loop.append(time.perf_counter() - started)


def trainer_overhead(setup: Setup, warm_up: int, rounds: int) -> dict[str, Any]:
    """`trainer_overhead`: median seconds per step of the loop over those of the bare step, minus 1.

    The loop is that of a run: module, trainer, throughput, progress, metrics.csv.
    """
    num_steps = warm_up + rounds + 1  # no batch is requested after the last one
    off = [f"~callbacks.{name}" for name in _NOT_TIMED]
    made = planned(setup, "auto", f"trainer.max_steps={num_steps}", *off)
    config, facts, _ = made
    twin = build_ours(config, facts)
    batches = [noise_crops(config, seed) for seed in range(2)]

    def bare(crops: Crops, number: int) -> None:
        twin(crops, Progress(number, num_steps, num_steps))

    loader = Alternating(bare, batches, num_steps)
    with (
        tempfile.TemporaryDirectory() as scratch,
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        quiet_lightning()
        run = Run(Path(scratch))
        _, module, callbacks = build(*made, run)
        trainer = build_trainer(config, facts, run, num_steps, callbacks, resuming=False)
        trainer.fit(module, loader)
    seconds = {
        "bare": statistics.median(loader.bare[warm_up:-1]),
        "loop": statistics.median(loader.loop[warm_up:]),
    }
    return {"trainer_overhead": seconds["loop"] / seconds["bare"] - 1, "trainer_seconds": seconds}
