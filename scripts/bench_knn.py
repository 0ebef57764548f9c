#!/usr/bin/env python3
"""Compare our weighted k-NN with a straightforward implementation of the published one.

    scripts/bench_knn.py [--json FILE] [--rounds 3] [--each-k]

A bank of 50,000 features of 384 dimensions in 1,000 classes, sorted by class as in folders, and
10,000 queries; accuracy at k = 10, 20, 100 and 200. Both sides have the same features, in separate
processes; they take turns, so only one computes at a time.

* speed_ratio: seconds of the plain side / ours, median over rounds. The plain side searches once
  for all four k; with --each-k once per k, as when a function of one k is called four times
* memory_ratio: ours / the plain side's; peak resident memory in addition to the features
* equal: whether all accuracies, top-1 and top-5, are equal

OMP_NUM_THREADS sets the number of threads of both sides.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from plain_knn import plain_knn
from step_process import Memory, Served, SideError, machine

from dino_lite.eval.features import Features
from dino_lite.eval.knn import knn_accuracy
from dino_lite.eval.neighbors import unit

KS, TEMPERATURE = (10, 20, 100, 200), 0.07
SIDES = ("reference", "ours")
Accuracies = dict[int, tuple[float, float]]


class Sizes(NamedTuple):
    """Number and width of the features, and number of classes."""

    num_train: int = 50_000
    num_test: int = 10_000
    dim: int = 384
    num_classes: int = 1000


def clustered(sizes: Sizes) -> tuple[Features, Features]:
    """Train and test features: unit rows scattered widely around the center of their class."""
    generator = torch.Generator().manual_seed(0)
    centers = torch.randn(sizes.num_classes, sizes.dim, generator=generator) / 3.5

    def scattered(num: int) -> Features:
        labels = torch.arange(num) * sizes.num_classes // num
        noise = torch.randn(num, sizes.dim, generator=generator)
        return Features(unit(noise.add_(centers[labels])), labels)

    return scattered(sizes.num_train), scattered(sizes.num_test)


def ours(bank: Features, queries: Features) -> Accuracies:
    """Accuracies as computed by `dino-lite evaluate`."""
    found = knn_accuracy(queries, bank, KS, TEMPERATURE)
    return {k: (accuracy.top1, accuracy.top5) for k, accuracy in found.items()}


def reference(bank: Features, queries: Features, each_k: bool = False) -> Accuracies:
    """Accuracies of the plain side, with one search for all ks or one for each."""
    num_classes = int(bank.labels.max()) + 1
    found: Accuracies = {}
    for ks in [[k] for k in KS] if each_k else [list(KS)]:
        found |= plain_knn(*bank[:2], *queries[:2], ks, TEMPERATURE, num_classes)
    return found


def same(found: Accuracies, wanted: Accuracies) -> bool:
    """Whether all accuracies are equal."""
    pairs = [(a, b) for k in KS for a, b in zip(found[k], wanted[k], strict=True)]
    return all(abs(a - b) < 1e-6 for a, b in pairs)


def _serve(pipe: Any, name: str, sizes: Sizes, each_k: bool) -> None:
    """A side: reports when ready; on True evaluates, on None sends its memory and exits."""
    try:
        bank, queries = clustered(sizes)
        memory = Memory(torch.device("cpu"))
        work: Callable[[], Accuracies] = (
            (lambda: ours(bank, queries))
            if name == "ours"
            else (lambda: reference(bank, queries, each_k))
        )
        pipe.send("ready")
        while pipe.recv() is not None:
            started = time.perf_counter()
            found = work()
            pipe.send((time.perf_counter() - started, found))
        pipe.send(memory.peak())
    except (EOFError, KeyboardInterrupt):
        sys.exit(1)
    except Exception as error:
        pipe.send(SideError(f"{type(error).__name__}: {error}".splitlines()[0]))


def bench(sizes: Sizes, rounds: int, each_k: bool) -> dict[str, Any]:
    """Run both sides in turns, alternating which is first."""
    seconds: dict[str, list[float]] = {name: [] for name in SIDES}
    accuracy: dict[str, Accuracies] = {}
    with (
        Served(SIDES[0], _serve, SIDES[0], sizes, each_k) as plain,
        Served(SIDES[1], _serve, SIDES[1], sizes, each_k) as mine,
    ):
        sides = dict(zip(SIDES, (plain, mine), strict=True))
        for side in sides.values():
            side.wait()
        for number in range(rounds):
            for name in SIDES if number % 2 == 0 else SIDES[::-1]:
                taken, accuracy[name] = sides[name].ask(True)
                seconds[name].append(taken)
        memory = {name: side.ask(None) for name, side in sides.items()}
    ratios = [a / b for a, b in zip(*seconds.values(), strict=True)]
    known = None not in memory.values()
    return {
        "speed_ratio": statistics.median(ratios),
        "speed_ratio_min": min(ratios),
        "speed_ratio_max": max(ratios),
        "memory_ratio": memory["ours"] / memory["reference"] if known else None,
        "seconds": {name: statistics.median(values) for name, values in seconds.items()},
        "memory_bytes": memory,
        "accuracy": {
            name: {k: {"top1": top1, "top5": top5} for k, (top1, top5) in found.items()}
            for name, found in accuracy.items()
        },
        "equal": same(accuracy["ours"], accuracy["reference"]),
        "sizes": sizes._asdict(),
        "searches": len(KS) if each_k else 1,
        "rounds": rounds,
    }


def table(found: dict[str, Any]) -> str:
    """The results as Markdown."""
    titles = ("", "seconds", "memory", *(f"k = {k}: top-1, top-5 %" for k in KS))
    rows = [titles, ("---",) * len(titles)]
    for name in SIDES:
        size = found["memory_bytes"][name]
        cells = [name, f"{found['seconds'][name]:.2f}"]
        cells.append("?" if size is None else f"{size / 2**20:,.0f} MiB")
        for accuracy in found["accuracy"][name].values():
            cells.append(f"{accuracy['top1']:.2f}, {accuracy['top5']:.2f}")
        rows.append(tuple(cells))
    memory = found["memory_ratio"]
    told = "" if memory is None else f", in {memory:.2f} of the memory"
    span = f"{found['speed_ratio_min']:.2f} to {found['speed_ratio_max']:.2f}"
    lines = [f"| {' | '.join(row)} |" for row in rows]
    lines += ["", f"{found['speed_ratio']:.2f} times as fast ({span}){told}; accuracies "]
    return "\n".join(lines) + ("are equal" if found["equal"] else "DIFFER")


def main(arguments: list[str] | None = None, sizes: Sizes = Sizes()) -> int:  # noqa: B008
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--each-k", action="store_true", help="the plain side searches for each k")
    options = parser.parse_args(arguments)
    about = {"machine": machine(), "torch": torch.__version__}
    try:
        found = bench(sizes, options.rounds, options.each_k) | about
    except SideError as error:
        print(error, file=sys.stderr)
        return 2
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(f"{about['machine']}, torch {about['torch']}, rounds: {options.rounds}\n\n{table(found)}")
    return int(not found["equal"])


if __name__ == "__main__":
    sys.exit(main())
