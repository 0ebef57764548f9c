#!/usr/bin/env python3
"""Compare the cost of our step with a straightforward implementation of the published one.

    scripts/bench_step.py [--json FILE] [--rounds 10] [--config NAME ...] [--batch N]
    scripts/bench_step.py --whole [--photos DIR] [--json FILE] [--rounds 10]

Both sides have the same crops and initial weights and do the same arithmetic. They run in separate
processes and take steps in turns, so only one computes at a time. Per configuration:

* ratio: seconds of the plain step / ours, median over rounds; each in its usual precision (plain:
  float32, on a GPU float16 by autocast; ours: that of `trainer.precision=auto`)
* ratio_fp32, loss_difference: the ratio with float32 on both sides, and the difference of losses
* memory_ratio: ours / the plain side's; peak above the process before the model is built, of
  resident memory, or on a GPU of memory allocated by torch
* trainer_overhead: the training loop of a run on prepared crops over the bare step, minus 1
* mfu: ours on a GPU, relative to the measured speed of large bfloat16 matrix products there

--whole measures `dino-lite pretrain` itself instead: the difference of two lengths.
OMP_NUM_THREADS sets the number of threads of both sides.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from step_process import Setup, Side, SideError, accelerator, machine, precision_of, save_student
from trainer_overhead import trainer_overhead
from whole_process import whole_process

from dino_lite.contracts import UserError

WARM_UP = 2  # rounds: the first may compile
BATCH_FP32 = 64  # largest batch on a GPU that is also measured in float32

CPU = (
    Setup("vit_tiny_16_224", "vit_tiny_patch16_224", 16, 224, 96, 8, 65_536, 8),
    Setup("vit_tiny_8_64", "vit_tiny_patch16_224", 8, 64, 32, 8, 4096, 16),
)
_SMALL = Setup("vit_small_16_224", "vit_small_patch16_224", 16, 224, 96, 8, 65_536, 64)
GPU = (
    *(_SMALL._replace(name=f"{_SMALL.name}_b{n}", batch_size=n) for n in (64, 128, 256)),
    Setup("vit_base_16_224", "vit_base_patch16_224", 16, 224, 96, 8, 65_536, 64),
)
TINY = Setup("tiny", "vit", 8, 16, 8, 2, 32, 4, 32, 16)  # seconds: for tests
ROOMY = 60 * 2**30  # bytes of GPU memory that fit both sides of ViT-B at 64 images


# --------------------------------------------------------------------------------------- the duels


def duel(setup: Setup, student: Path, precisions: tuple[str, str], rounds: int) -> dict[str, Any]:
    """Measure the plain side and ours in these precisions, taking steps in turns."""
    seconds: dict[str, list[float]] = {"reference": [], "ours": []}
    losses: dict[str, list[float]] = {"reference": [], "ours": []}
    with (
        Side("the reference", setup, precisions[0], student) as plain,
        Side("ours", setup, precisions[1]) as mine,
    ):
        sides = {"reference": plain, "ours": mine}
        for side in sides.values():
            side.wait()
        for number in range(WARM_UP + rounds):
            for name in sides if number % 2 == 0 else reversed(sides):
                taken, loss = sides[name].step(number)
                seconds[name].append(taken)
                losses[name].append(loss)
        memory = {name: side.memory() for name, side in sides.items()}
    timed = {name: values[WARM_UP:] for name, values in seconds.items()}
    ratios = [a / b for a, b in zip(timed["reference"], timed["ours"], strict=True)]
    medians = {name: statistics.median(values) for name, values in timed.items()}
    apart = [abs(a - b) for a, b in zip(*losses.values(), strict=True)]
    parts = [d / abs(a) for d, a in zip(apart, losses["reference"], strict=True)]
    known = memory["ours"] is not None and memory["reference"]
    return {
        "precision": dict(zip(sides, precisions, strict=True)),
        "ratio": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "seconds": medians,
        "images_per_second": {n: setup.batch_size / value for n, value in medians.items()},
        "memory_bytes": memory,
        "memory_ratio": memory["ours"] / memory["reference"] if known else None,
        "loss_difference": {"absolute": max(apart), "relative": max(parts)},
        "losses": losses,
    }


def bench(setup: Setup, rounds: int) -> dict[str, Any]:
    """All measurements of one configuration."""
    usual = ("fp16" if accelerator() == "cuda" else "32", precision_of(setup))
    with tempfile.TemporaryDirectory() as scratch:
        student = Path(scratch) / "student.pt"
        save_student(setup, student)
        found = duel(setup, student, usual, rounds)
        fp32 = found if usual == ("32", "32") else None
        if fp32 is None and (accelerator() == "cpu" or setup.batch_size <= BATCH_FP32):
            fp32 = duel(setup, student, ("32", "32"), rounds)
        flops = step_flops(setup, torch.load(student, weights_only=True)["weights"], cls_only=True)
    found |= {
        "name": setup.name,
        "setup": setup._asdict(),
        "ratio_fp32": fp32 and fp32["ratio"],
        "loss_difference": fp32 and fp32["loss_difference"],
        "fp32": None if fp32 is found else fp32,
        "mfu": None,
    }
    if fp32 is found:
        found["note"] = "float32 is ours by default on this machine: ratio is ratio_fp32"
    if accelerator() == "cuda":
        found["mfu"] = flops / found["seconds"]["ours"] / matmul_ceiling()
    found["trainer_overhead"] = None
    try:
        found |= fresh_process(trainer_overhead, setup, WARM_UP, rounds)
    except Exception as error:  # keep the results of the duels in any case
        found["error"] = f"trainer_overhead: {type(error).__name__}: {error}"
    return found


def fresh_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call `function` in a fresh process; returns its result."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


# ------------------------------------------------------------------------------- operations


def step_flops(setup: Setup, weights: dict[str, torch.Tensor], cls_only: bool = False) -> float:
    """Floating-point operations of the matrix products in a plain step, without recomputation. With
    `cls_only`, of our step, whose last block computes only the class token.
    """
    width = weights["backbone.cls_token"].shape[-1]
    depth = sum(name.endswith(".norm1.weight") for name in weights)
    hidden = weights["backbone.blocks.0.mlp.fc1.weight"].shape[0]

    def backbone(size: int) -> tuple[int, int]:
        """Forward pass of one crop: blocks, and patch embedding, whose input has no gradient."""
        num = (size // setup.patch_size) ** 2
        linear = 2 * (num + 1) * (4 * width**2 + 2 * width * hidden)
        attention = 4 * (num + 1) ** 2 * width
        left_out = 2 * num * (2 * width**2 + 2 * width * hidden) + 4 * num * (num + 1) * width
        blocks = depth * (linear + attention) - cls_only * left_out
        return blocks, 2 * num * 3 * setup.patch_size**2 * width

    head = 2 * setup.hidden_dim * (width + setup.hidden_dim + setup.bottleneck_dim)
    head += 2 * setup.bottleneck_dim * setup.num_prototypes
    large, small = backbone(setup.global_size), backbone(setup.local_size)
    teacher = 2 * (sum(large) + head)
    student = 2 * (3 * (large[0] + head) + 2 * large[1])
    student += setup.num_local * (3 * (small[0] + head) + 2 * small[1])
    return float(setup.batch_size * (teacher + student))


def matmul_ceiling() -> float:
    """Operations per second of bfloat16 products of square matrices on this GPU, best of some."""
    best = 0.0
    for size in (4096, 8192):
        a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        for _ in range(5):
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(10):
                a @ b
            stop.record()
            torch.cuda.synchronize()
            best = max(best, 10 * 2 * size**3 / (start.elapsed_time(stop) / 1e3))
    return best


# ----------------------------------------------------------------------------------------- telling


_COLUMNS = ("configuration", "precision", "ratio", "fp32", "loss apart", "memory", "img/s")
_COLUMNS += ("trainer", "mfu")


def table(found: list[dict[str, Any]]) -> str:
    """The results as Markdown; whole processes and failures as lines."""
    measured = [one for one in found if "setup" in one]
    rows = [_row(_COLUMNS), _row(["---"] * len(_COLUMNS))] if measured else []
    for one in measured:
        speed, memory, apart = one["images_per_second"], one["memory_bytes"], one["loss_difference"]
        sizes = f"{_mib(memory['ours'])} of {_mib(memory['reference'])}"
        cells = [
            one["name"],
            f"{one['precision']['reference']} / {one['precision']['ours']}",
            f"**{one['ratio']:.2f}** ({one['ratio_min']:.2f} to {one['ratio_max']:.2f})",
            _told(one["ratio_fp32"], ".2f"),
            _told(apart and apart["relative"], ".1e"),
            f"{_told(one['memory_ratio'], '.2f')} ({sizes})",
            f"{speed['ours']:.1f} of {speed['reference']:.1f}",
            _told(one["trainer_overhead"], "+.1%"),
            _told(one["mfu"], ".0%"),
        ]
        rows.append(_row(cells))
    for one in found:
        if whole := one.get("whole_process"):
            rows.append(
                f"{one['name']}: {whole['seconds_per_step']:.3f} s per step, "
                f"{whole['images_per_second']:.1f} img/s, data_wait {whole['data_wait']:.1%}"
            )
        elif "error" in one:
            rows.append(f"{one['name']} failed: {one['error']}")
    return "\n".join(rows)


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _told(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _mib(value: int | None) -> str:
    return "?" if value is None else f"{value / 2**20:,.0f} MiB"


# ------------------------------------------------------------------------------------ command line


def chosen(names: list[str] | None, batch: int | None) -> list[Setup]:
    """The named configurations, by default those for this machine."""
    usual = GPU if accelerator() == "cuda" else CPU
    known = {setup.name: setup for setup in (*CPU, *GPU, TINY)}
    if unknown := [name for name in names or [] if name not in known]:
        raise SideError(f"--config {unknown[0]}: known are {', '.join(known)}")
    setups = [known[name] for name in names] if names else list(usual)
    return [setup._replace(batch_size=batch or fitting(setup)) for setup in setups]


def fitting(setup: Setup) -> int:
    """Batch size of `setup`; half of it for ViT-B on a GPU that does not fit both sides."""
    if not setup.backbone.startswith("vit_base") or accelerator() == "cpu":
        return setup.batch_size
    roomy = torch.cuda.get_device_properties(0).total_memory >= ROOMY
    return setup.batch_size if roomy else setup.batch_size // 2


def measure(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One dictionary per configuration; if one fails, it holds the error, and the others run."""
    keys = ("ratio", "ratio_fp32", "memory_ratio", "trainer_overhead")
    if options.whole:
        for one in whole_process(options.rounds, options.photos):
            yield dict.fromkeys(keys) | one
        return
    for setup in chosen(options.config, options.batch):
        try:
            yield bench(setup, options.rounds)
        except (SideError, UserError) as error:
            yield dict.fromkeys(keys) | {"name": setup.name, "error": str(error)}


def main(arguments: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there")
    parser.add_argument("--rounds", type=int, default=10, help="after two warm-up rounds")
    parser.add_argument("--config", nargs="+", metavar="NAME", help="default: those for the device")
    parser.add_argument("--batch", type=int, metavar="N", help="overrides the batch size")
    parser.add_argument("--whole", action="store_true", help="dino-lite pretrain, start to end")
    parser.add_argument("--photos", type=Path, metavar="DIR", help="photographs for --whole")
    options = parser.parse_args(arguments)
    about = {"machine": machine(), "torch": torch.__version__, "rounds": options.rounds}
    found: list[dict[str, Any]] = []
    try:
        for one in measure(options):
            found.append(one | about)
            if options.json:  # after each one, so that an interrupted run keeps its results
                options.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
            print(f"{one['name']} is done", file=sys.stderr, flush=True)
    except SideError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{about['machine']}, torch {about['torch']}, rounds: {options.rounds}\n\n{table(found)}")
    return int(any("error" in one for one in found))


if __name__ == "__main__":
    sys.exit(main())
