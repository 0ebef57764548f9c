"""Trainings that several benchmarks compare: some at a time, each on one core, resumable."""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import platform
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any, NamedTuple, Protocol

Parts = dict[str, dict[str, Any]]  # what was measured, by the name of the training
Train = Callable[[Any], dict[str, Any]]  # runs in a process of its own


class Task(Protocol):
    """A training."""

    @property
    def name(self) -> str:
        """Identifies it among the parts."""

    @property
    def needs(self) -> str | None:
        """The part that must be there first."""


class Asked(NamedTuple):
    """The command line, and the clock since it was read."""

    options: argparse.Namespace
    work: Path
    started: float

    def keep(self, parts: Parts, **more: Any) -> None:
        """Write what is known by now to --json, if asked for, with the machine."""
        if self.options.json:
            about = {"cpu": processor(), "cores": os.cpu_count(), "seeds": self.options.seeds}
            spent = {"wall_seconds": round(time.perf_counter() - self.started, 1)}
            content = about | spent | more | {"parts": parts}
            self.options.json.write_text(json.dumps(content, indent=2) + "\n")


def parser(about: str | None, work: str) -> argparse.ArgumentParser:
    """The options that all benchmarks of trainings have; `work` is the default folder."""
    found = argparse.ArgumentParser(
        description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    found.add_argument("--seeds", type=int, default=3)
    found.add_argument("--jobs", type=int, default=2, help="trainings at a time")
    found.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there too")
    found.add_argument("--work", type=Path, default=Path(work), metavar="FOLDER")
    return found


def asked(options: argparse.Namespace) -> Asked:
    """What the command line asks for, with the folder made; processes started later compute on one
    thread each.
    """
    os.environ["OMP_NUM_THREADS"] = "1"
    work = options.work.absolute()
    work.mkdir(parents=True, exist_ok=True)
    return Asked(options, work, time.perf_counter())


def read_parts(file: Path) -> Parts:
    """The parts that an earlier command has measured."""
    found: Parts = json.loads(file.read_text()) if file.is_file() else {}
    return found


def run_all(
    tasks: Sequence[Task],
    train: Train,
    file: Path,
    at_once: Asked,
    told: Callable[[dict[str, Any]], str] = json.dumps,
) -> Parts:
    """Run the tasks that are not in `file`, --jobs at a time, each when what it needs is there, and
    keep each result there and in --json; returns all parts.
    """
    parts, jobs = read_parts(file), at_once.options.jobs
    left = [task for task in tasks if task.name not in parts]
    running: dict[Future[dict[str, Any]], Task] = {}
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=jobs, mp_context=spawn) as pool:
        while left or running:
            ready = [task for task in left if task.needs is None or task.needs in parts]
            for task in ready[: jobs - len(running)]:
                left.remove(task)
                running[pool.submit(train, task)] = task
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                name = running.pop(future).name
                parts[name] = future.result()
                part = file.with_suffix(".part")
                part.write_text(json.dumps(parts, indent=1))
                os.replace(part, file)
                at_once.keep(parts)
                print(f"{name}: {told(parts[name])}", flush=True)
    return parts


def processor() -> str:
    """The CPU's name."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()
