#!/usr/bin/env python3
"""Measure how time and memory of a step scale with batch, prototypes, local crops and resolution.

    scripts/measure_scaling.py [--json FILE] [--plots DIR] [--rounds 5] [--quick]

Varies one of the four at a time around a base configuration. Every point runs in a separate
process, to measure its memory; the points of a sweep take steps in turns. Time is the median over
rounds, in the precision of a run. --quick uses a tiny base, as a smoke test.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from step_process import Setup, Side, SideError, accelerator, machine, precision_of

from dino_lite.contracts import UserError

WARM_UP = 2  # rounds


class Sweep(NamedTuple):
    """A field of a Setup and its values; `unit` labels the axis."""

    field: str
    unit: str
    values: tuple[int, ...]


class Study(NamedTuple):
    """A base configuration and the sweeps around it."""

    base: Setup
    sweeps: tuple[Sweep, ...]


def study(base: Setup, values: tuple[tuple[int, ...], ...]) -> Study:
    """Sweeps of the four fields over `values`, one tuple each."""
    fields = {
        "batch_size": "images a step",
        "num_prototypes": "prototypes",
        "num_local": "local crops",
        "global_size": "pixels of a global crop",
    }
    sweeps = zip(fields.items(), values, strict=True)
    return Study(base, tuple(Sweep(field, unit, some) for (field, unit), some in sweeps))


QUICK = study(
    Setup("tiny", "vit", 8, 16, 8, 2, 32, 4, 32, 16), ((4, 16), (32, 1024), (0, 2), (16, 32))
)
CPU = study(
    Setup("ViT-Ti/8", "vit_tiny_patch16_224", 8, 64, 32, 4, 4096, 8),
    ((4, 8, 16, 32), (4096, 16_384, 32_768, 65_536), (0, 2, 4, 8), (48, 64, 96, 128)),
)
GPU = study(
    Setup("ViT-S/16", "vit_small_patch16_224", 16, 224, 96, 8, 65_536, 64),
    ((32, 64, 128, 256), (16_384, 32_768, 65_536, 131_072), (0, 4, 8, 12), (160, 224, 320, 384)),
)


def varied(base: Setup, field: str, value: int) -> Setup:
    """`base` with `field` set to `value`; the ratio of local to global crop size is kept."""
    setup = base._replace(name=f"{base.name}, {field}={value}", **{field: value})
    if field == "global_size":
        patch = base.patch_size
        part = round(base.local_size / base.global_size * value / patch)
        setup = setup._replace(local_size=max(1, part) * patch)
    return setup


def measure(base: Setup, sweep: Sweep, rounds: int) -> list[dict[str, Any]]:
    """One point per value: seconds per step and peak memory, or the reason for their absence."""
    points: list[dict[str, Any]] = []
    precision = precision_of(base)
    with ExitStack() as stack:
        sides = []
        for value in sweep.values:
            setup = varied(base, sweep.field, value)
            sides.append(stack.enter_context(Side("ours", setup, precision)))
            points.append({sweep.field: value, "setup": setup._asdict(), "seconds": []})
        _each(sides, points, lambda side, point: side.wait())
        for number in range(WARM_UP + rounds):
            _each(sides, points, lambda side, p, n=number: p["seconds"].append(side.step(n)[0]))
        _each(sides, points, lambda side, point: point.update(memory_bytes=side.memory()))
    for point in points:
        taken = point.pop("seconds")[WARM_UP:]
        if "error" not in point:
            point["seconds"] = statistics.median(taken)
            point["images_per_second"] = point["setup"]["batch_size"] / point["seconds"]
    return points


def _each(sides: list[Side], points: list[dict[str, Any]], act: Any) -> None:
    """Call `act` on every point that has not failed; record the error of one that fails."""
    for side, point in zip(sides, points, strict=True):
        if "error" not in point:
            try:
                act(side, point)
            except (SideError, UserError) as error:
                point["error"] = str(error)


def table(sweep: Sweep, points: list[dict[str, Any]]) -> str:
    """A sweep as Markdown."""
    rows = [f"| {sweep.unit} | ms a step | images/s | MiB |", "| --- | --- | --- | --- |"]
    for point in points:
        told = point.get("error")
        if told is None:
            peak = point["memory_bytes"]
            size = "?" if peak is None else f"{peak / 2**20:,.0f}"
            told = f"{1e3 * point['seconds']:,.0f} | {point['images_per_second']:,.1f} | {size}"
        rows.append(f"| {point[sweep.field]:,} | {told} |")
    return "\n".join(rows)


def draw(base: Setup, sweep: Sweep, points: list[dict[str, Any]], file: Path) -> None:
    """Time and memory against the varied number, side by side."""
    from matplotlib.figure import Figure

    good = [point for point in points if "error" not in point]
    x = [point[sweep.field] for point in good]
    time = [1e3 * point["seconds"] for point in good]
    memory = [(point["memory_bytes"] or 0) / 2**20 for point in good]
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    panels = figure.subplots(1, 2)
    for axes, y, label in zip(
        panels, (time, memory), ("ms a step", "MiB at the peak"), strict=True
    ):
        axes.plot(x, y, marker="o")
        axes.set_xlabel(sweep.unit)
        axes.set_ylabel(label)
        axes.set_xticks(x, [f"{value:,}" for value in x])
        axes.set_xlim(0, 1.05 * max(x, default=1))
        axes.set_ylim(0, 1.1 * max(y, default=1))
        axes.grid(alpha=0.3)
    figure.suptitle(f"{described(base, sweep.field)}\n{machine()}", fontsize=9)
    figure.savefig(file, dpi=150)


def described(base: Setup, field: str) -> str:
    """Describe the base in words, without the varied field."""
    words = {
        "batch_size": f"{base.batch_size} images",
        "num_prototypes": f"{base.num_prototypes:,} prototypes",
        "num_local": f"{base.num_local} local crops",
        "global_size": f"crops of {base.global_size} and {base.local_size} px",
    }
    kept = ", ".join(text for name, text in words.items() if name != field)
    return f"{base.name}, {kept}, precision {precision_of(base)}"


def main(arguments: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there")
    parser.add_argument("--plots", type=Path, metavar="DIR", help="write a PNG per sweep")
    parser.add_argument("--rounds", type=int, default=5, help="after two warm-up rounds")
    parser.add_argument("--quick", action="store_true", help="a tiny base")
    options = parser.parse_args(arguments)
    chosen = QUICK if options.quick else GPU if accelerator() == "cuda" else CPU
    found: dict[str, Any] = {"machine": machine(), "torch": torch.__version__}
    found |= {"base": chosen.base._asdict(), "rounds": options.rounds, "sweeps": {}}
    print(f"{machine()}, torch {torch.__version__}, rounds: {options.rounds}")
    for sweep in chosen.sweeps:
        points = measure(chosen.base, sweep, options.rounds)
        found["sweeps"][sweep.field] = points
        print(f"\n{described(chosen.base, sweep.field)}\n\n{table(sweep, points)}", flush=True)
        if options.plots:
            options.plots.mkdir(parents=True, exist_ok=True)
            draw(chosen.base, sweep, points, options.plots / f"scaling_{sweep.field}.png")
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return int(any("error" in point for points in found["sweeps"].values() for point in points))


if __name__ == "__main__":
    sys.exit(main())
