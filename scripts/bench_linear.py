#!/usr/bin/env python3
"""Compare the training time of the linear probe's whole grid with that of a single head.

    scripts/bench_linear.py [--json FILE] [--rounds 10] [--dim 384] [--classes 10] [--batch 1024]

Steps on the same random features alternate in one process, on a GPU if available:

* grid: all 52 heads at once, as `dino-lite evaluate eval=linear` trains them
* one: the same code with one head on CLS of 4 blocks + mean patch, the widest; one_mean: mean over
  one head of each of the four widths
* modules: 52 linear layers of torch with autograd and torch's SGD, the usual implementation

Medians over rounds. ratio = grid / one, ratio_mean = grid / one_mean, speed_up = modules / grid.
The grid has 31 times the arithmetic of its widest head, which shows on a CPU with many classes.
OMP_NUM_THREADS sets the number of threads.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from dino_lite.eval.features import Pooled
from dino_lite.eval.linear import RATES
from dino_lite.eval.probes import MOMENTUM, Head, LinearHeads, join, make_grid

NUM_IMAGES = 16_384
WARM_UP = 2  # rounds
Step = Callable[[], None]


def draw(dim: int, num_classes: int) -> Pooled:
    """Draw random features of four blocks, in the shapes that a network of this width gives."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(NUM_IMAGES, 5, dim, generator=generator)
    labels = torch.randint(num_classes, (NUM_IMAGES,), generator=generator)
    return Pooled(tokens[:, :4].contiguous(), tokens[:, 4].contiguous(), labels, labels)


def ours(grid: list[Head], pooled: Pooled, batch: int, device: torch.device) -> Step:
    """A step of the evaluation's own code."""
    heads = LinearHeads(grid, pooled, int(pooled.labels.max()) + 1, device, seed=0)

    def step() -> None:
        heads.step(*join(pooled, torch.randint(NUM_IMAGES, (batch,)), device), 0.5)

    return step


def modules(grid: list[Head], pooled: Pooled, batch: int, device: torch.device) -> Step:
    """A step of separate linear layers, each with its own matrix product."""
    num_classes = int(pooled.labels.max()) + 1
    columns = [head.columns(4, pooled.cls.shape[2], pooled.patches.shape[1]) for head in grid]
    layers = nn.ModuleList(nn.Linear(c.stop - c.start, num_classes) for c in columns).to(device)
    groups = [
        {"params": [*layer.parameters()], "lr": head.rate}
        for head, layer in zip(grid, layers, strict=True)
    ]
    optimizer = torch.optim.SGD(groups, momentum=MOMENTUM)

    def step() -> None:
        rows, labels = join(pooled, torch.randint(NUM_IMAGES, (batch,)), device)
        losses = [
            F.cross_entropy(layer(rows[:, c]), labels)
            for c, layer in zip(columns, layers, strict=True)
        ]
        optimizer.zero_grad()
        torch.stack(losses).sum().backward()
        optimizer.step()

    return step


def seconds(step: Step, device: torch.device) -> float:
    """Seconds that a step takes."""
    started = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def bench(dim: int, num_classes: int, batch: int, rounds: int) -> dict[str, Any]:
    """Seconds per step of each side, alternating."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pooled = draw(dim, num_classes)
    grid = make_grid([1, 4], [False, True], RATES, batch)
    sides = {"grid": ours(grid, pooled, batch, device)}
    for i in range(0, len(grid), len(RATES)):
        sides[f"one_{i}"] = ours(grid[i : i + 1], pooled, batch, device)
    sides["modules"] = modules(grid, pooled, batch, device)
    taken: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(WARM_UP + rounds):
        for name, step in sides.items():
            taken[name].append(seconds(step, device))
    medians = {name: statistics.median(values[WARM_UP:]) for name, values in taken.items()}
    ones = [medians.pop(name) for name in list(medians) if name.startswith("one_")]
    medians |= {"one": ones[-1], "one_mean": statistics.mean(ones)}
    return {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "dim": dim,
        "classes": num_classes,
        "batch": batch,
        "heads": len(grid),
        "seconds": medians,
        "ratio": medians["grid"] / medians["one"],
        "ratio_mean": medians["grid"] / medians["one_mean"],
        "speed_up": medians["modules"] / medians["grid"],
    }


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there too")
    for name, default in (("rounds", 10), ("dim", 384), ("classes", 10), ("batch", 1024)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args(arguments)
    found = bench(options.dim, options.classes, options.batch, options.rounds)
    milliseconds = {name: f"{1e3 * value:.2f} ms" for name, value in found["seconds"].items()}
    print(f"{found['device']}, a step of {found['heads']} heads and of one: {milliseconds}")
    print(
        f"ratio {found['ratio']:.2f} (mean of the widths {found['ratio_mean']:.2f}); "
        f"{found['speed_up']:.2f} times as fast as modules"
    )
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
