"""Times `dino-lite pretrain` from start to end: the difference between a long and a short run.

What remains is the time of steps, including everything else a run does during training.
"""

from __future__ import annotations

import csv
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from step_process import SideError, accelerator

from dino_lite.config import get, load

PHOTOS = Path(__file__).resolve().parents[1].parent / "shared" / "data" / "caltech101_30.zip"


def whole_process(rounds: int, photos: Path | None) -> Iterator[dict[str, Any]]:
    """Measure a run on the embedded set, and one on photographs: `photos`, or ../shared/data."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        # Steps are short compared with the variation of start-up times, so take more of them.
        yield _subtracted("pretrain_shapes", ["data=shapes"], 5 * rounds, folder)
        if photos is None and PHOTOS.is_file():
            photos = folder / "photos"
            with zipfile.ZipFile(PHOTOS) as archive:
                archive.extractall(photos)
        if photos is not None:
            yield _subtracted("pretrain_photos", [f"data.root={photos}"], rounds, folder)


def _subtracted(name: str, source: list[str], rounds: int, scratch: Path) -> dict[str, Any]:
    """Seconds per step, images/s, and fraction of time waiting for data of the run `name`. The two
    lengths differ by the steps of `rounds` rows of metrics.csv.
    """
    folder = scratch / name
    every = 50 if accelerator() == "cuda" else 10  # steps between two rows
    lengths = {"short": every, "long": every * (1 + rounds)}
    seconds = {length: _train(source, folder, length, n) for length, n in lengths.items()}
    taken = (seconds["long"] - seconds["short"]) / (lengths["long"] - lengths["short"])
    batch_size = get(load(folder / "long" / "config.yaml"), "loader.batch_size")
    with open(folder / "long" / "metrics.csv", newline="", encoding="utf-8") as file:
        waits = [float(row["data_wait"]) for row in csv.DictReader(file) if row.get("data_wait")]
    found = {
        "seconds_per_step": taken,
        "images_per_second": batch_size / taken,
        "data_wait": statistics.mean(waits[1:]),  # the first includes the start of workers
        "batch_size": batch_size,
        "steps": lengths,
        "seconds": seconds,
    }
    return {"name": name, "whole_process": found}


def _train(source: list[str], folder: Path, name: str, num_steps: int) -> float:
    """Run the command; returns its seconds."""
    line = [sys.executable, "-m", "dino_lite.commands.pretrain", *source]
    line += ["baselines=false", "~callbacks.online_eval", "~callbacks.pictures"]
    line += [f"trainer.max_steps={num_steps}", f"runs_dir={folder}", f"name={name}"]
    started = time.perf_counter()
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no word"])[-1]
        raise SideError(f"dino-lite pretrain {' '.join(source)}: {last}")
    return time.perf_counter() - started
