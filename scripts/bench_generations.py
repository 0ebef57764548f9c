#!/usr/bin/env python3
"""Do networks gain from learning what an equal network before them has learned?

    scripts/bench_generations.py [--seeds 3] [--data FILE.npz] [--json FILE] [--work FOLDER]
                                 [--jobs 2]

For each seed, without labels: `dino-lite pretrain generations=3` of a small convnet, each
generation as many steps as the first. With labels: `eval=finetune eval.finetune.generations=3` of
its first generation, once for each objective, and with new weights (scratch). Images: --data, in
the form of data=npz, else the embedded shapes. --jobs trainings run at a time, each on one core.
Each finished one is kept in --work: the same command resumes.

Of each arm, means over seeds in percent of the test images (k-NN without labels): accuracy of
generations 1 to 3, agreement of the later ones with their teacher, ensemble. gain is the last
generation minus the first, ensemble_gain the ensemble minus the first; _spread is the largest minus
the smallest over seeds.
"""

from __future__ import annotations

import contextlib
import functools
import statistics
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from trainings import Parts, asked, parser, run_all

from dino_lite.commands.evaluate import run_evaluate
from dino_lite.config import compose
from dino_lite.runs.generations import run_generations

GENERATIONS = 3
PRETRAIN = [
    "backbone=convnet",
    "backbone.widths=[16,32]",
    "method=simdino",
    "trainer.max_steps=300",
    "~callbacks.pictures",
    "baselines=false",
    "trainer.accelerator=cpu",
    "trainer.num_threads=1",
    "loader.num_workers=0",
]
SHAPES = ["data=shapes", "data.num_train=2000", "data.num_test=2000"]
FINETUNE = ["num_epochs=10", "rate=4e-3"]
OBJECTIVES = {
    "labels+logits": ["born_again=labels+logits"],
    "logits": ["born_again=logits"],
    "cwtm": ["born_again=cwtm"],
    "dkpp": ["born_again=dkpp"],
    "scratch": ["born_again=labels+logits", "from_scratch=true"],
}


class Task(NamedTuple):
    """An arm of a seed, "SEED/ARM", and the settings of its command."""

    name: str
    command: str
    settings: list[str]
    needs: str | None = None  # the part that must be there first


def tasks(work: Path, data: list[str], seeds: int, extra: list[str]) -> list[Task]:
    """The pretrainings, and the fine-tunings of their first generations."""
    trained, tuned = [], []
    for seed in range(seeds):
        runs = work / "runs"
        several = [f"generations={GENERATIONS}", f"name=seed{seed}", f"runs_dir={runs}"]
        words = [*data, *PRETRAIN, *extra, f"seed={seed}", *several]
        trained.append(Task(f"{seed}/pretrain", "pretrain", words))
        for name, objective in OBJECTIVES.items():
            own = [f"generations={GENERATIONS}", f"seed={seed}", *FINETUNE, *objective]
            words = ["eval=finetune", *(f"eval.finetune.{word}" for word in own)]
            start = [f"checkpoint={runs}/seed{seed}/01_pretrain", "accelerator=cpu"]
            tuned.append(Task(f"{seed}/{name}", "evaluate", [*start, *words], f"{seed}/pretrain"))
    return [*trained, *tuned]


def measure(task: Task, work: Path) -> dict[str, Any]:
    """Train; returns accuracies, agreements and ensemble in percent, and seconds."""
    log = work / f"{task.name.replace('/', '_')}.log"
    torch.set_num_threads(1)
    started = time.perf_counter()
    config = compose(task.command, task.settings)
    with log.open("a") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        if task.command == "evaluate":
            found = run_evaluate(config)["finetune"]
            rows, ensemble = found["generations"], found["ensemble"]
        else:
            stages = run_generations(config)["stages"]
            found = list(stages.values())[-1]["generations"]
            rows = [row["test"] | {"agreement": row["agreement"]} for row in found["generations"]]
            ensemble = found["ensemble"]["test"]
    return {
        "accuracy": [row["top1"] for row in rows],
        "agreement": [row["agreement"] for row in rows[1:]],
        "ensemble": ensemble["top1"],
        "warnings": found.get("warnings", []),
        "seconds": round(time.perf_counter() - started, 1),
    }


def summary(parts: Parts, seeds: int) -> dict[str, dict[str, Any]]:
    """Means and spreads over seeds, by arm."""
    arms: dict[str, dict[str, Any]] = {}
    for arm in ("pretrain", *OBJECTIVES):
        each = [parts[f"{seed}/{arm}"] for seed in range(seeds)]
        gains = {
            "gain": [part["accuracy"][-1] - part["accuracy"][0] for part in each],
            "ensemble_gain": [part["ensemble"] - part["accuracy"][0] for part in each],
        }
        arms[arm] = {
            "accuracy": means([part["accuracy"] for part in each]),
            "agreement": means([part["agreement"] for part in each]),
            "ensemble": round(statistics.mean(part["ensemble"] for part in each), 2),
            "warnings": sum(len(part["warnings"]) for part in each),
        }
        for key, values in gains.items():
            arms[arm][key] = round(statistics.mean(values), 2)
            arms[arm][f"{key}_spread"] = round(max(values) - min(values), 2)
    return arms


def means(rows: list[list[float]]) -> list[float]:
    """The mean over rows of each column."""
    return [round(statistics.mean(column), 2) for column in zip(*rows, strict=True)]


def table(arms: dict[str, dict[str, Any]]) -> str:
    """The summary in Markdown."""
    numbers = range(1, GENERATIONS + 1)
    head = ["", *(f"generation {i}" for i in numbers), "ensemble", "gain (spread)", "agreement"]
    lines = [head, ["---"] * len(head)]
    for arm, found in arms.items():
        gain = f"{found['gain']:+.1f} ({found['gain_spread']:.1f})"
        agreement = ", ".join(f"{value:.1f}" for value in found["agreement"])
        each = [f"{value:.1f}" for value in (*found["accuracy"], found["ensemble"])]
        lines.append([arm, *each, gain, agreement])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    words = parser(__doc__, "bench_generations")
    words.add_argument("--data", type=Path, metavar="FILE", help="images as for data=npz")
    words.add_argument("extra", nargs="*", help="settings of pretrain, as trainer.max_steps=8")
    at_once = asked(words.parse_args(arguments))
    options, work = at_once.options, at_once.work
    data = ["data=npz", f"data.root={options.data.absolute()}"] if options.data else SHAPES
    todo = tasks(work, data, options.seeds, options.extra)
    parts = run_all(todo, functools.partial(measure, work=work), work / "parts.json", at_once)
    arms = summary(parts, options.seeds)
    print(table(arms))
    at_once.keep(parts, **arms)
    return 0


if __name__ == "__main__":
    sys.exit(main())
