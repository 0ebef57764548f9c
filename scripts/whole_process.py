"""`dino-lite pretrain` from start to end: two lengths of one run, the short one subtracted.

What stays is steps, with all that a run does beside them.
"""

from __future__ import annotations

import csv
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Any

from step_process import SideError, accelerator

from dino_lite.config import get, load

PHOTOS = Path(__file__).resolve().parents[1].parent / "shared" / "data" / "caltech101_30.zip"


def whole_process(rounds: int) -> list[dict[str, Any]]:
    """A run on the embedded set, and on photographs where ../shared/data has them."""
    with tempfile.TemporaryDirectory() as scratch:
        sources = {"pretrain_shapes": ["data=shapes"]}
        if PHOTOS.is_file():
            with zipfile.ZipFile(PHOTOS) as archive:
                archive.extractall(Path(scratch) / "photos")
            sources["pretrain_photos"] = [f"data.root={scratch}/photos"]
        return [
            {"name": name, "whole_process": _subtracted(source, rounds, Path(scratch) / name)}
            for name, source in sources.items()
        ]


def _subtracted(source: list[str], rounds: int, folder: Path) -> dict[str, Any]:
    """Seconds a step, images/s and the share of time waiting for data; as many steps between the
    two lengths as `rounds` rows of metrics.csv.
    """
    every = 50 if accelerator() == "cuda" else 10  # steps between two rows
    lengths = {"short": every, "long": every * (1 + rounds)}
    seconds = {name: _train(source, folder, name, steps) for name, steps in lengths.items()}
    taken = (seconds["long"] - seconds["short"]) / (lengths["long"] - lengths["short"])
    batch_size = get(load(folder / "long" / "config.yaml"), "loader.batch_size")
    with open(folder / "long" / "metrics.csv", newline="", encoding="utf-8") as file:
        waits = [float(row["data_wait"]) for row in csv.DictReader(file) if row.get("data_wait")]
    return {
        "seconds_per_step": taken,
        "images_per_second": batch_size / taken,
        "data_wait": statistics.mean(waits[1:]),  # workers start in the first
        "batch_size": batch_size,
        "steps": lengths,
        "seconds": seconds,
    }


def _train(source: list[str], folder: Path, name: str, num_steps: int) -> float:
    """Seconds of the whole command."""
    line = [sys.executable, "-m", "dino_lite.commands.pretrain", *source]
    line += ["baselines=false", "~callbacks.online_knn", "~callbacks.pictures"]
    line += [f"trainer.max_steps={num_steps}", f"runs_dir={folder}", f"name={name}"]
    started = time.perf_counter()
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no word"])[-1]
        raise SideError(f"dino-lite pretrain {' '.join(source)}: {last}")
    return time.perf_counter() - started
