#!/usr/bin/env python3
"""Compare the speed of `dino-lite embed` with that of a plain loop over a timm model.

    scripts/bench_embed.py [--json FILE] [--images DIR] [--model vit_small_patch16_224] [--rounds 5]
                           [--most 256] [--batch 64] [--workers 1]

Both read the same JPEGs with as many workers and write the class tokens of the same network, with
the same weights, to .npy; they alternate in one process, on a GPU if available:

* ours: the inner loop of `dino-lite embed`
* plain: torchvision's ImageFolder and transforms, a DataLoader, the timm model in inference mode

ratio: median over rounds of plain / ours seconds, above 1 if ours is faster; cpu_ratio: the same of
CPU seconds with those of the workers, which other programs on the machine hardly change. Without
DIR, which has a folder for each class, JPEGs of 640x480 pixels are drawn. OMP_NUM_THREADS sets the
number of threads.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from torch.utils.data import DataLoader, Subset
from torchvision import transforms
from torchvision.datasets import ImageFolder

from dino_lite.contracts import Splits
from dino_lite.data.clean import CleanData
from dino_lite.data.given import as_source
from dino_lite.eval.embedder import Embedder
from dino_lite.eval.feature_files import write_table
from dino_lite.eval.feature_parts import parts_of, usual_part_images, write_parts
from dino_lite.formats.weights import open_weights


def draw(folder: Path, num: int) -> Path:
    """Draw `num` JPEGs of two classes: smooth noise, which is coded like a photograph."""
    generator = np.random.default_rng(0)
    for i in range(num):
        coarse = generator.integers(0, 256, (30, 40, 3), dtype=np.uint8)
        smooth = np.asarray(Image.fromarray(coarse).resize((640, 480), Image.Resampling.BICUBIC))
        noisy = smooth + generator.normal(0, 8, smooth.shape)
        path = folder / "ab"[i % 2] / f"{i:05d}.jpg"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(path, quality=90)
    return folder


def ours(options: argparse.Namespace, weights: Path, out: Path) -> tuple[Callable[[], None], int]:
    """Embedding as the command does it, and the size of images."""
    opened = open_weights(weights)
    opened.backbone.to(options.device)
    paths = [path for path, _ in options.files.samples[: options.most]]
    source = as_source(paths)
    splits = Splits(source, None, "bench")
    data = CleanData(splits, opened.preprocessing, options.batch, options.workers)
    embedder = Embedder(opened.backbone, opened.preprocessing.size, "cls")
    parts = parts_of({"train": source}, usual_part_images(embedder.image_bytes))

    def run() -> None:
        write_parts(
            embedder,
            data,
            {"train": source},
            parts,
            lambda part, table, bad: write_table(table, out / part.title, "npy"),
        )

    return run, opened.image_size


def plain(options: argparse.Namespace, model: Any, size: int, out: Path) -> Callable[[], None]:
    """What one writes with torchvision and timm."""
    resize = transforms.Resize(round(size * 256 / 224), transforms.InterpolationMode.BICUBIC)
    normalize = transforms.Normalize(
        timm.data.IMAGENET_DEFAULT_MEAN, timm.data.IMAGENET_DEFAULT_STD
    )
    steps = [resize, transforms.CenterCrop(size), transforms.ToTensor(), normalize]
    options.files.transform = transforms.Compose(steps)
    images = Subset(options.files, range(min(options.most, len(options.files))))

    def run() -> None:
        loader = DataLoader(
            images,
            batch_size=options.batch,
            num_workers=options.workers,
            pin_memory=options.device == "cuda",
        )
        found = []
        with torch.inference_mode():
            for batch, _ in loader:
                found.append(model(batch.to(options.device, non_blocking=True)).cpu())
        np.save(out / "plain.npy", torch.cat(found).numpy())

    return run


def bench(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Seconds of each side, alternating."""
    torch.manual_seed(0)
    model = timm.create_model(options.model, num_classes=0).eval().to(options.device)
    weights = folder / "model.pth"
    torch.save(model.state_dict(), weights)
    mine, size = ours(options, weights, folder)
    sides = {"ours": mine, "plain": plain(options, model, size, folder)}
    taken: dict[str, list[float]] = {name: [] for name in sides}
    used: dict[str, list[float]] = {name: [] for name in sides}
    for i in range(options.rounds + 1):  # the first warms up
        order = list(sides) if i % 2 else list(reversed(sides))
        for name in order:
            started, before = time.perf_counter(), cpu_seconds()
            sides[name]()
            taken[name].append(time.perf_counter() - started)
            used[name].append(cpu_seconds() - before)
    seconds = {name: values[1:] for name, values in taken.items()}
    num = min(options.most, len(options.files))
    written = sorted(folder.glob("train-*"))
    theirs = np.load(folder / "plain.npy")
    found = np.concatenate([np.load(part / "cls.npy") for part in written])
    return {
        "device": torch.cuda.get_device_name() if options.device == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "workers": options.workers,
        "model": options.model,
        "image_size": size,
        "batch": options.batch,
        "images": num,
        "seconds": seconds,
        "images_per_second": {n: num / statistics.median(v) for n, v in seconds.items()},
        "largest_difference": float(np.abs(found - theirs).max() / np.sqrt((theirs**2).mean())),
        "ratio": ratio(taken),
        "cpu_ratio": ratio(used),
    }


def cpu_seconds() -> float:
    """Of this process and of workers that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def ratio(values: dict[str, list[float]]) -> float:
    """Median over rounds of plain / ours, without the first round."""
    both = zip(values["plain"][1:], values["ours"][1:], strict=True)
    return statistics.median(plain / ours for plain, ours in both)


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there too")
    parser.add_argument("--images", type=Path, metavar="DIR", help="a folder for each class")
    parser.add_argument("--model", default="vit_small_patch16_224", help="a plain ViT of timm")
    for name, default in (("rounds", 5), ("most", 256), ("batch", 64), ("workers", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args(arguments)
    options.device = "cuda" if torch.cuda.is_available() else "cpu"
    with tempfile.TemporaryDirectory() as name:
        images = options.images
        if images is None:
            (Path(name) / "images").mkdir()
            images = draw(Path(name) / "images", options.most)
        options.files = ImageFolder(str(images))
        found = bench(options, Path(name))
    rates = ", ".join(f"{n} {rate:.1f}" for n, rate in found["images_per_second"].items())
    print(
        f"{found['device']}, {found['model']}, {found['workers']} workers: {rates} images/s; ratio "
        f"{found['ratio']:.2f}, of CPU time {found['cpu_ratio']:.2f}; largest difference "
        f"{found['largest_difference']:.1e} of the rms"
    )
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
