#!/usr/bin/env python3
"""Does a small network gain more from a teacher than from DINO on its own?

    scripts/bench_distillation.py [--seeds 3] [--json FILE] [--work FOLDER] [--jobs 2]
                                    [--chain]

CIFAR-10 (10,000 images of train, all 10,000 of test) and caltech101_30 (1,800 and 448, shrunk and
cropped to 64 pixels), from ../shared. Accuracy is k-NN (k = 20) of the test images, in percent. For
each data set, one convnet is pretrained as the teacher; then for each seed a student of half its
width is trained, on one core each:

* distilled: `dino-lite distill` from the teacher
* dino_equal_steps: DINO, for as many steps as the distillation
* dino_equal_seconds: DINO, for as many seconds as the distillation
* simdino_equal_steps: the teacher's own method instead, reported beside; first seed only
* dino_all_seconds: DINO, for the seconds of teacher and distillation; first seed only

Two trainings (--jobs) run at a time, each on one core, so that their seconds compare. Each finished
one is kept in --work and --json: the same command resumes. --chain also trains a student of three
quarters of the teacher's width, and the student from that one, and compares the latter with direct
distillation of as many steps as both.

Of each data set, means over seeds: minus_dino_equal_steps, minus_dino_equal_seconds, minus_floor
(distilled minus the better of its untrained network and raw pixels), and gain_kept = (distilled -
untrained student) / (teacher - untrained teacher). The headline of each is that of the worse data
set; _spread is the largest minus the smallest over seeds. The bar: > 0, > 0, >= 3 points, >= 0.70.
"""

from __future__ import annotations

import contextlib
import functools
import json
import statistics
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from small_images import write_caltech101_30, write_cifar10
from trainings import Parts, asked, parser, run_all

from dino_lite.commands.distill import run_distill
from dino_lite.config import compose, load
from dino_lite.data.clean import CleanData
from dino_lite.eval.baselines import knn_against_baselines
from dino_lite.planning.plan import open_splits
from dino_lite.runs.checkpoint import find_checkpoint, open_backbone
from dino_lite.runs.pretraining import run_pretrain
from dino_lite.runs.run import Run

NUM_PER_CLASS = 1000  # training images of CIFAR-10
DATA = ("cifar10", "caltech101_30")
TEACHER = ["backbone=convnet", "method=simdino"]
WIDTHS = {"teacher": [32, 64], "middle": [24, 48], "student": [16, 32]}
STEPS = {"teacher": 1000, "student": 300}
QUIET = ["~callbacks.pictures", "~callbacks.online_eval", "baselines=false"]
BAR = {"minus_dino_equal_steps": 0, "minus_dino_equal_seconds": 0, "minus_floor": 3}
BAR_KEPT = 0.70


class Task(NamedTuple):
    """A training: its name "DATA/teacher" or "DATA/SEED/NAME", the command and its settings."""

    name: str
    command: str
    settings: list[str]
    baselines: tuple[str, ...] = ()  # beside "trained"
    folder: str = ""  # of the trained network, within the run
    needs: str | None = None  # the part that must be there first


def student(name: str = "student") -> str:
    """A student of `dino-lite distill`, as a setting."""
    return f"{name}:{{backbone:convnet,widths:{WIDTHS[name]}}}"


def data_settings(work: Path, data: str, seed: int) -> list[str]:
    """Settings that all trainings on a data set share."""
    return ["data=npz", f"data.root={work / data}.npz", f"seed={seed}", *QUIET]


def teachers(work: Path) -> list[Task]:
    """The teachers, whose untrained networks and raw pixels are measured as well."""
    settings = [*TEACHER, f"backbone.widths={WIDTHS['teacher']}"]
    steps = f"trainer.max_steps={STEPS['teacher']}"
    return [
        Task(f"{data}/teacher", "pretrain", [*data_settings(work, data, 0), *settings, steps],
             ("untrained", "raw pixels"))
        for data in DATA
    ]  # fmt: skip


def distillations(work: Path, seeds: int, chain: bool) -> list[Task]:
    """The students of each seed; with `chain`, a chain and its comparison for the first."""
    tasks = []

    def task(data: str, seed: int, name: str, students: str, steps: int, *more: str) -> None:
        teacher = f"teacher={work / 'runs' / data / 'teacher'}"
        common = [*data_settings(work, data, seed), teacher, f"students={{{students}}}", *more]
        common += [f"trainer.max_steps={steps}", "distill.export=false"]
        folder = "02_student/student" if len(more) else "01_distill/student"
        tasks.append(
            Task(
                f"{data}/{seed}/{name}",
                "distill",
                common,
                ("untrained",),
                folder,
                f"{data}/teacher",
            )
        )

    for seed in range(seeds):
        for data in DATA:
            task(data, seed, "distilled", student(), STEPS["student"])
    for data in DATA if chain else ():
        both = f"{student('middle')},{student()}"
        task(data, 0, "chain", both, STEPS["student"], "distill.chain=true")
        task(data, 0, "direct", student(), 2 * STEPS["student"])
    return tasks


def comparisons(work: Path, seeds: int, parts: Parts) -> list[Task]:
    """The same students trained without a teacher."""
    tasks = []

    def task(data: str, seed: int, name: str, *settings: str) -> None:
        common = [*data_settings(work, data, seed), "backbone=convnet"]
        common += [f"backbone.widths={WIDTHS['student']}", *settings]
        tasks.append(Task(f"{data}/{seed}/{name}", "pretrain", common))

    steps = f"trainer.max_steps={STEPS['student']}"
    for seed in range(seeds):
        for data in DATA:
            spent = parts[f"{data}/{seed}/distilled"]["seconds"]
            task(data, seed, "dino_equal_steps", steps)
            task(data, seed, "dino_equal_seconds", f"trainer.max_time={spent:.1f}s")
    for data in DATA:
        task(data, 0, "simdino_equal_steps", steps, "method=simdino")
    for data in DATA:
        spent = parts[f"{data}/teacher"]["seconds"] + parts[f"{data}/0/distilled"]["seconds"]
        task(data, 0, "dino_all_seconds", f"trainer.max_time={spent:.1f}s")
    return tasks


def train(task: Task, work: Path) -> dict[str, Any]:
    """Train, or resume, on one core; returns steps, seconds and k-NN accuracies in percent."""
    name = task.name.rpartition("/")[2]
    runs = (work / "runs" / task.name).parent
    settings = [*task.settings, f"runs_dir={runs}", f"name={name}", "trainer.num_threads=1"]
    settings.append("loader.num_workers=0")  # which would use another core
    torch.set_num_threads(1)
    log = work / "runs" / f"{task.name.replace('/', '_')}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        if task.command == "distill":
            run_distill(compose("distill", settings), [])
        else:
            run_pretrain(compose("pretrain", settings))
        run = Run(runs / name / task.folder)
        found = {key: run.results()[key] for key in ("steps", "train_seconds")}
        opened = open_backbone(find_checkpoint(str(run.folder), runs), ())
        config = load(run.config_file)
        images = CleanData(open_splits(config["data"]), opened.preprocessing, 256, 0)
        measured = knn_against_baselines(
            opened.backbone, images, config["seed"], ("trained", *task.baselines)
        )
        for title, values in measured:
            found[title.replace(" ", "_")] = values[f"knn_{title.replace(' ', '_')}"]
    return {"steps": found["steps"], "seconds": found.pop("train_seconds")} | found


def told(part: dict[str, Any]) -> str:
    """What was measured, on one line."""
    accuracies = [f"{k} {v:.2f} %" for k, v in part.items() if k not in ("steps", "seconds")]
    return f"{', '.join(accuracies)}; {part['steps']} steps, {part['seconds']:.0f} s"


def of_seed(parts: Parts, data: str, seed: int) -> dict[str, float]:
    """The keys of one seed on one data set."""
    teacher, own = parts[f"{data}/teacher"], parts[f"{data}/{seed}/distilled"]
    got = own["trained"]
    alone = {
        f"minus_{name}": got - parts[f"{data}/{seed}/{name}"]["trained"]
        for name in ("dino_equal_steps", "dino_equal_seconds")
    }
    return {
        **alone,
        "minus_floor": got - max(own["untrained"], teacher["raw_pixels"]),
        "gain_kept": (got - own["untrained"]) / (teacher["trained"] - teacher["untrained"]),
    }


def summary(parts: Parts, seeds: int) -> dict[str, Any]:
    """Means and spreads over seeds by data set, and those of the worse data set for each key."""
    by_data: dict[str, dict[str, float]] = {}
    for data in sorted({name.partition("/")[0] for name in parts}):
        each = [of_seed(parts, data, seed) for seed in range(seeds)]
        by_data[data] = {}
        for key in each[0]:
            values = [found[key] for found in each]
            by_data[data] |= {
                key: round(statistics.mean(values), 3),
                f"{key}_spread": round(max(values) - min(values), 3),
            }
    worst: dict[str, Any] = {}
    for key in (*BAR, "gain_kept"):
        data = min(by_data, key=lambda name: by_data[name][key])
        worst |= {name: by_data[data][name] for name in (key, f"{key}_spread")}
    worst["met"] = worst["gain_kept"] >= BAR_KEPT and all(
        worst[key] >= least if least else worst[key] > 0 for key, least in BAR.items()
    )
    return worst | {"data": by_data}


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit code: 1 if the bar was not met."""
    words = parser(__doc__, "bench_distillation")
    words.add_argument("--chain", action="store_true", help="compare a chain with direct")
    at_once = asked(words.parse_args(arguments))
    work, seeds = at_once.work, at_once.options.seeds
    write_cifar10(work, NUM_PER_CLASS)
    write_caltech101_30(work)
    run = functools.partial(
        run_all,
        train=functools.partial(train, work=work),
        file=work / "parts.json",
        at_once=at_once,
        told=told,
    )
    parts = run([*teachers(work), *distillations(work, seeds, at_once.options.chain)])
    parts = run(comparisons(work, seeds, parts))
    found = summary(parts, seeds)
    at_once.keep(parts, **found)
    for data, values in found["data"].items():
        print(f"{data}: {', '.join(f'{key} {value:.2f}' for key, value in values.items())}")
    print(f"worse data set: {json.dumps({k: v for k, v in found.items() if k != 'data'})}")
    return 0 if found["met"] else 1


if __name__ == "__main__":
    sys.exit(main())
