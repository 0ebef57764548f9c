#!/usr/bin/env python3
"""Does `dino-lite adapt` forget less than plain continued training, and gain as much?

    scripts/bench_continual.py [--seeds 3] [--json FILE] [--work FOLDER] [--jobs 2]
                               [--new NAME] [--apart]

For each seed, a small ViT is pretrained on CIFAR-10 (5,000 images of train, from ../shared), and
then goes on in several ways, from the same weights and heads for as many steps, on the embedded
shapes (10,000 test images), or on the photographs that --new names:

* plain_1, plain_0.3, plain_0.1: the same method at this factor of its rate
* gated: `dino-lite adapt`'s retention, without replay or a choice between start and end
* replay, promise (with --apart): `dino-lite adapt` with keep.share, and with CIFAR-10 as
  `keep.root`: it chooses a point between start and end

Accuracy is k-NN (k = 20) of the test images with the train images as bank, in percent: on CIFAR-10
(all 10,000 test images, the 5,000 as bank) its loss is what was forgotten, on the new images its
increase what was gained. --jobs trainings run at a time, each on one core. Each finished part is
kept in --work and --json: the same command resumes.

plain_forgetting, plain_gain: points, at the rate that gains most, means over seeds.
forgetting_ratio, gain_ratio: those of the gated arm relative to these. _spread: largest minus
smallest over seeds. The bar counts only where both are at least 5 points: then at most a third is
forgotten, and at least 80 % gained.
"""

from __future__ import annotations

import contextlib
import functools
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from small_images import unpack, write_cifar10
from trainings import Parts, asked, parser, run_all

from dino_lite.commands.adapt import run_adapt
from dino_lite.config import Config, compose, load
from dino_lite.data.clean import CleanData
from dino_lite.eval.baselines import knn_against_baselines
from dino_lite.planning.plan import open_splits
from dino_lite.runs.checkpoint import find_checkpoint, open_backbone
from dino_lite.runs.pretraining import run_pretrain

NUM_PER_CLASS = 500  # training images of CIFAR-10
RATES = (1.0, 0.3, 0.1)
STEPS = {"start": 1200, "arm": 1000}
COMMON = [
    "method=simdino", "backbone=vit", "backbone.name=vit", "backbone.embed_dim=96",
    "backbone.depth=2", "backbone.num_heads=3", "backbone.patch_size=8", "augment.num_local=2",
    "loader.batch_size=64",
]  # fmt: skip
START = ["augment.global_scale=[0.6,1.0]", "augment.local_scale=[0.2,0.6]"]
# Patterns without an upright orientation. Without turns, plain training forgets 2 points at most.
ARM = ["augment.global_scale=[0.25,1.0]", "augment.local_scale=[0.05,0.3]"]
ARM += [f"augment.{crops}.quarter_turns=true" for crops in ("global_1", "global_2", "local")]
GATED = ["loss=[simdino,kept]", "optim.rate_scale=0.3"]  # beside adapt's defaults
QUIET = [
    "~callbacks.pictures", "~callbacks.online_eval", "baselines=false", "trainer.accelerator=cpu",
    "trainer.precision=32", "trainer.compile=false", "trainer.num_threads=1",
    "loader.num_workers=0",
]  # fmt: skip
ENOUGH = 5.0  # points that plain training must forget and gain
MOST_FORGOTTEN, LEAST_GAINED = 1 / 3, 0.8


class Task(NamedTuple):
    """A training: its name "SEED/ARM", and the settings of `pretrain` or `adapt`."""

    name: str
    command: str
    settings: list[str]
    needs: str | None  # the part that must be there first


def tasks(work: Path, seeds: int, new: str, apart: bool) -> list[Task]:
    """All trainings, seed by seed."""
    found = []
    for seed in range(seeds):
        common = [*COMMON, *QUIET, f"seed={seed}"]
        old = [f"data.root={work / 'cifar10.npz'}"]
        steps = f"trainer.max_steps={STEPS['start']}"
        start = f"{seed}/start"
        found.append(Task(start, "pretrain", ["data=npz", *old, *common, *START, steps], None))
        common += [*ARM, *data_settings(work, new), f"trainer.max_steps={STEPS['arm']}"]
        common += [f"checkpoint={work / 'runs' / str(seed) / 'start'}"]
        for rate in RATES:
            arm = [*common, f"optim.rate_scale={rate}"]
            found.append(Task(f"{seed}/plain_{rate:g}", "pretrain", arm, start))
        gated = [*common, *GATED]
        found.append(Task(f"{seed}/gated", "gated", gated, start))
        if apart:
            kept = ["data@keep=npz", f"keep.root={work / 'cifar10.npz'}"]
            found.append(Task(f"{seed}/promise", "adapt", [*gated, *kept], start))
            found.append(Task(f"{seed}/replay", "adapt", [*gated, *kept, "keep.share=0.2"], start))
    return found


def data_settings(work: Path, new: str) -> list[str]:
    """Settings that open the new images at 32 pixels."""
    if new == "shapes":
        return ["data=shapes", "data.num_test=10000"]
    return [f"data.root={work / new}"]


def train(task: Task, work: Path, new: str) -> dict[str, Any]:
    """Train, or resume, on one core; returns k-NN accuracies on both test sets, in percent."""
    seed, _, arm = task.name.partition("/")
    arm = arm if arm == "start" else f"{new}_{arm}"
    runs, started = work / "runs" / seed, time.perf_counter()
    settings = [*task.settings, f"runs_dir={runs}", f"name={arm}"]
    torch.set_num_threads(1)
    runs.mkdir(parents=True, exist_ok=True)
    with (
        (runs / f"{arm}.log").open("a") as file,
        contextlib.redirect_stdout(file),
        contextlib.redirect_stderr(file),
    ):
        if task.command == "adapt":
            run_adapt(compose("adapt", settings), [])
        else:
            command = "adapt" if task.command == "gated" else "pretrain"
            run_pretrain(as_stage(compose(command, settings)))
        trained = time.perf_counter()
        network = (
            runs / arm / "01_adapt" if arm.endswith("_replay") else runs / arm
        )  # its end, not a choice
        old = ["data=npz", f"data.root={work / 'cifar10.npz'}"]
        found = {
            key: accuracy(network, compose("pretrain", data)["data"])
            for key, data in (("old", old), ("new", data_settings(work, new)))
        }
    now = time.perf_counter()
    return found | {"seconds": round(trained - started, 1), "measured": round(now - trained, 1)}


def as_stage(config: Config) -> Config:
    """What continues from a start normalizes pixels as it did. A configuration of `adapt` becomes
    one of `pretrain` whose frozen teacher is the start: no choice follows the stage.
    """
    if not (start := config["checkpoint"]):
        return config
    stage = {key: value for key, value in config.items() if key not in ("keep", "stages", "adapt")}
    teacher = {"teacher": {"checkpoint": start}} if "adapt" in config else {}
    return stage | teacher | {"normalize": load(Path(start) / "config.yaml")["normalize"]}


def accuracy(network: Path, data: Config) -> float:
    """k-NN accuracy in percent: test images, the train images as bank."""
    opened = open_backbone(find_checkpoint(str(network), ""), ())
    images = CleanData(open_splits(data), opened.preprocessing, 256, 0)
    ((_, values),) = knn_against_baselines(opened.backbone, images, 0, ("trained",))
    return float(values["knn_trained"])


def told(part: dict[str, Any]) -> str:
    """What was measured, on one line."""
    return f"old {part['old']:.2f} %, new {part['new']:.2f} %; {part['seconds']:.0f} s"


def changes(parts: Parts, arm: str, seeds: int) -> dict[str, list[float]]:
    """Points forgotten and gained by an arm, of each seed."""
    pairs = [(parts[f"{seed}/start"], parts[f"{seed}/{arm}"]) for seed in range(seeds)]
    return {
        "forgetting": [start["old"] - end["old"] for start, end in pairs],
        "gain": [end["new"] - start["new"] for start, end in pairs],
    }


def summary(parts: Parts, seeds: int) -> dict[str, Any]:
    """The keys of the bar, and the changes of every arm that all seeds have."""
    arms = sorted({name.partition("/")[2] for name in parts} - {"start"})
    done = [arm for arm in arms if all(f"{seed}/{arm}" in parts for seed in range(seeds))]
    found = {arm: changes(parts, arm, seeds) for arm in done}
    rates = [arm for arm in done if arm.startswith("plain_")]
    best = max(rates, key=lambda arm: statistics.mean(found[arm]["gain"]))
    keys: dict[str, Any] = {}
    for what in ("forgetting", "gain"):
        plain, gated = found[best][what], found["gated"][what]
        keys[f"plain_{what}"] = round(statistics.mean(plain), 3)
        keys[f"plain_{what}_spread"] = round(max(plain) - min(plain), 3)
        keys[f"{what}_ratio"] = keys[f"{what}_ratio_spread"] = None  # where plain has none
        if statistics.mean(plain) > 0:
            keys[f"{what}_ratio"] = round(statistics.mean(gated) / statistics.mean(plain), 3)
        if min(plain) > 0:
            each = [ours / theirs for ours, theirs in zip(gated, plain, strict=True)]
            keys[f"{what}_ratio_spread"] = round(max(each) - min(each), 3)
    counts = min(keys["plain_forgetting"], keys["plain_gain"]) >= ENOUGH
    met = counts and keys["forgetting_ratio"] <= MOST_FORGOTTEN
    met = met and keys["gain_ratio"] >= LEAST_GAINED
    return keys | {"plain": best, "counts": counts, "met": met, "arms": found}


def table(found: dict[str, Any]) -> str:
    """The arms as Markdown: means over seeds, and the seeds."""
    rows = ["| arm | forgotten | gained |", "| --- | --- | --- |"]
    for arm, what in found["arms"].items():
        cells = [
            f"{statistics.mean(values):.1f} ({', '.join(f'{value:.1f}' for value in values)})"
            for values in (what["forgetting"], what["gain"])
        ]
        rows.append(f"| {arm} | {cells[0]} | {cells[1]} |")
    return "\n".join(rows)


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit code: 1 if the bar was not met."""
    words = parser(__doc__, "bench_continual")
    words.add_argument(
        "--new", default="shapes", choices=["shapes", "caltech101_30", "ucmerced128"]
    )
    words.add_argument("--apart", action="store_true", help="replay and promise as well")
    at_once = asked(words.parse_args(arguments))
    work, options = at_once.work, at_once.options
    write_cifar10(work, NUM_PER_CLASS)
    if options.new != "shapes" and not (work / options.new).is_dir():
        unpack(options.new, work / options.new)
    todo = tasks(work, options.seeds, options.new, options.apart)
    one = functools.partial(train, work=work, new=options.new)
    parts = run_all(todo, one, work / f"{options.new}.json", at_once, told)
    found = summary(parts, options.seeds)
    at_once.keep(parts, **found)
    print(table(found))
    print(json.dumps({key: value for key, value in found.items() if key != "arms"}))
    return 0 if found["met"] else 1


if __name__ == "__main__":
    sys.exit(main())
