#!/usr/bin/env python3
"""What the cost model predicts beside what is then measured: images/s and peak memory.

    scripts/measure_cost.py [--json FILE] [--threads 1] [--only NAME] [--rounds 5]

Each configuration runs in a process of its own: real optimizer steps (`Step`) on random crops, no
loader and no trainer. A round measures the device's peaks, then the quickest of some steps (one
thread of a CPU: by CPU time); a ratio is predicted / measured, the median over rounds. Memory on a
CPU is the resident set's peak above what the process had before the model was built. The bar is
0.75 to 1.25.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from step_process import Memory, build_ours, noise_crops

from dino_lite.config import Config, compose
from dino_lite.contracts import Progress
from dino_lite.cost import work
from dino_lite.estimate import EFFICIENCY, predict, step_parts
from dino_lite.machine import Facts, has_compiler, has_fast_bf16
from dino_lite.methods.timing import wait_for
from dino_lite.peaks import measure_peaks
from dino_lite.sizes import sizes

ROUND_SECONDS = 0.5  # of steps at least
PHOTOS = ["data=folder", "data.root=none", "trainer.max_time=null", "trainer.max_epochs=100"]
VIT = "backbone=vit"  # else the plan chooses a convolutional network
TINY = [VIT, "backbone.embed_dim=192", "backbone.depth=12", "backbone.num_heads=3"]
LARGE = ["augment.global_size=224", "augment.local_size=96", "augment.num_local=8"]
HEAD = ["method.head.hidden_dim=2048", "method.head.bottleneck_dim=256"]
PAPER = [*PHOTOS, *LARGE, *HEAD, "method.head.num_prototypes=65536"]
SMALL = ["backbone=vit_small", "backbone.patch_size=16"]
BASE = ["backbone=vit_base", "backbone.patch_size=16"]
# name: device, images, their side, overrides
CONFIGURATIONS: dict[str, tuple[str, int, int, list[str]]] = {
    "dino_shapes": ("cpu", 400, 32, ["experiment=dino_shapes"]),
    "photos_64": ("cpu", 5_000, 300, [*PHOTOS, VIT]),
    "photos_64_micro": (
        *("cpu", 50_000, 300),
        [*PHOTOS, VIT, "trainer.micro_batch_size=16", "method.head.num_prototypes=16384"],
    ),
    "photos_64_dinov2": ("cpu", 5_000, 300, [*PHOTOS, "method=dinov2"]),
    "photos_64_dinov3": (
        *("cpu", 5_000, 300),
        [*PHOTOS, "method=dinov3", "method.gram.start_step=0.0"],
    ),
    "vit_tiny_8_64": (
        *("cpu", 100_000, 300),
        [*PHOTOS, *TINY, *HEAD, "augment.num_local=8", "loader.batch_size=16"],
    ),
    "vit_tiny_16_224": (
        *("cpu", 10**6, 300),
        [*PAPER, *TINY, "backbone.patch_size=16", "loader.batch_size=8"],
    ),
    "vit_small_16_224": ("cuda", 10**6, 400, [*PAPER, *SMALL, "loader.batch_size=64"]),
    "vit_small_16_224_256": ("cuda", 10**6, 400, [*PAPER, *SMALL, "loader.batch_size=256"]),
    "vit_base_16_224": ("cuda", 10**6, 400, [*PAPER, *BASE, "loader.batch_size=64"]),
    "vit_base_16_224_dinov2": (
        *("cuda", 10**6, 400),
        ["method=dinov2", *PAPER, *BASE, "loader.batch_size=64"],
    ),
}


def planned(name: str, threads: int) -> tuple[Config, Facts]:
    """A configuration of the table, settled by the plan, and the facts it was settled on."""
    from dino_lite.planning.plan import plan

    accelerator, num_images, side, overrides = CONFIGURATIONS[name]
    on_gpu = accelerator == "cuda"
    facts = Facts(
        source="shapes" if name == "dino_shapes" else "photos",
        num_images=num_images,
        num_test=0,
        num_classes=0,
        height=side,
        width=side,
        channels=3,
        mean=(0.5,) * 3,
        std=(0.2,) * 3,
        accelerator=accelerator,
        device_name=torch.cuda.get_device_name() if on_gpu else "cpu",
        num_devices=1,
        num_cores=threads + 1,
        bf16=has_fast_bf16(accelerator),
        compiler=has_compiler(accelerator),
    )
    return plan(compose("pretrain", overrides), facts).config, facts


def warm_up(device: torch.device) -> None:
    """Load the libraries that a step needs: they are no part of its memory."""
    layer = torch.nn.TransformerEncoderLayer(32, 2, batch_first=True).to(device)
    torch.nn.Conv2d(3, 8, 4, device=device)(torch.ones(1, 3, 8, 8, device=device)).sum().backward()
    layer(torch.ones(2, 8, 32, device=device)).sum().backward()
    torch.optim.AdamW(layer.parameters(), fused=True).step()


def measure(name: str, threads: int, rounds: int) -> dict[str, Any]:
    """One configuration, in this process: predicted and measured."""
    torch.set_num_threads(threads)
    config, facts = planned(name, threads)
    device, on_gpu = torch.device(facts.accelerator), facts.accelerator == "cuda"
    size = sizes(config)
    assert size is not None
    warm_up(device)
    # One thread that others push aside takes longer by the wall, and no more of the processor.
    clock = time.process_time if threads == 1 and not on_gpu else time.perf_counter
    crops, memory = noise_crops(config), Memory(device)
    step = build_ours(config, facts)

    def train() -> float:
        started = clock()
        step(crops, Progress(50, 1000, 10))
        wait_for(device)
        return clock() - started

    def quickest() -> float:
        tried = [train()]
        while sum(tried) < ROUND_SECONDS:
            tried.append(train())
        return min(tried)

    for _ in range(3):
        train()
    peak = memory.peak()
    assert peak is not None
    share, told, peaks, times = EFFICIENCY[facts.accelerator], [], [], []
    for _ in range(rounds):
        peaks.append(measure_peaks(facts.accelerator, config["trainer"]["precision"], size.width))
        told.append(predict(config, facts, size, peaks[-1]))
        times.append(quickest())
    ratios = [t / e.seconds_per_step for t, e in zip(times, told, strict=True)]
    return {
        "name": name,
        "device": facts.device_name,
        "threads": threads,
        "images_per_second": size.num_images / statistics.median(times),
        "images_per_second_predicted": statistics.median(e.images_per_second for e in told),
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "memory": peak,
        "memory_predicted": told[0].memory,
        "memory_ratio": told[0].memory / peak,
        "seconds": times,
        "parts": [step_parts(work(size), p, share) for p in peaks],
        "peaks": [p._asdict() for p in peaks],
        "line": told[-1].line(),
    }


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there")
    parser.add_argument("--threads", type=int, default=1, help="of torch, on a CPU")
    parser.add_argument("--rounds", type=int, default=5, help="of peaks and steps")
    parser.add_argument("--only", choices=list(CONFIGURATIONS), help="one configuration")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measure(options.only, options.threads, options.rounds)))
        return 0
    found: list[dict[str, Any]] = []
    print(f"{'':22s}{'images/s':>10s}{'predicted':>10s}{'ratio':>7s}{'MiB':>10s}{'predicted':>10s}")
    for name, (accelerator, *_) in CONFIGURATIONS.items():
        asked = options.only in (None, name)
        if not asked or (accelerator == "cuda" and not torch.cuda.is_available()):
            continue
        line = [sys.executable, __file__, "--child", "--only", name]
        line += ["--threads", str(options.threads), "--rounds", str(options.rounds)]
        ran = subprocess.run(line, stdout=subprocess.PIPE, text=True, check=True)
        row = json.loads(ran.stdout.splitlines()[-1])
        found.append(row)
        print(
            f"{name:22s}{row['images_per_second']:10.1f}{row['images_per_second_predicted']:10.1f}"
            f"{row['ratio']:7.2f}{row['memory'] / 2**20:10.0f}"
            f"{row['memory_predicted'] / 2**20:10.0f}{row['memory_ratio']:7.2f}",
            flush=True,
        )
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
