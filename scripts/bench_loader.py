#!/usr/bin/env python3
"""Compare the cost of our multi-crop with the classic transforms on PIL images.

    scripts/bench_loader.py [--json FILE] [--rounds 5] [--photos DIR] [--small FILE.npz]

The reference is DINO's published pipeline, written with torchvision's transforms. Both sides run on
one thread, interleaved; a ratio is the median over rounds of reference / ours:

* worker_cpu_ratio: CPU time of a worker per photograph, including decoding, 2x224 + 8x96 pixels.
  The part of our work done on the device is reported separately.
* small_images_ratio: images/s of CIFAR-10, 2x32 + 6x16, everything included, the CPU as the device.

By default reads ../shared/data next to the checkout. Ours is compiled only with --compile.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFilter, ImageOps
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from dino_lite.backbones.vit import ViT
from dino_lite.contracts import Crops, Source, Splits
from dino_lite.data import datamodule as ours
from dino_lite.data.crops import MultiCrop
from dino_lite.data.datamodule import DataModule
from dino_lite.data.folder import open_folder
from dino_lite.data.parts import Part
from dino_lite.data.photometric import IMAGENET_MEAN, IMAGENET_STD, Normalize
from dino_lite.data.sources import ArraySource
from dino_lite.machine import num_cores

SHARED = Path(__file__).resolve().parents[1].parent / "shared" / "data"
LARGE, SMALL = (224, 96, 8), (32, 16, 6)  # global size, local size, local crops
PART = 64


# -------------------------------------------------------------------------------- the reference


class Blur:
    """PIL's Gaussian blur with probability `prob` and a radius drawn from [0.1, 2]."""

    def __init__(self, prob: float) -> None:
        self.prob = prob

    def __call__(self, image: Image.Image) -> Image.Image:
        if torch.rand(()) >= self.prob:
            return image
        radius = float(torch.empty(()).uniform_(0.1, 2.0))
        return image.filter(ImageFilter.GaussianBlur(radius))


def reference(sizes: tuple[int, int, int]) -> Callable[[Image.Image], list[torch.Tensor]]:
    """The published multi-crop (Caron et al. 2021) as a chain of classic transforms."""
    large, small, num_local = sizes

    def chain(size: int, scale: tuple[float, float], blur: float, solarize: float) -> Any:
        jitter = transforms.ColorJitter(0.4, 0.4, 0.2, 0.1)
        invert = transforms.Lambda(lambda image: ImageOps.solarize(image))
        return transforms.Compose(
            [
                transforms.RandomResizedCrop(
                    size, scale=scale, interpolation=InterpolationMode.BICUBIC
                ),
                transforms.RandomHorizontalFlip(),
                transforms.RandomApply([jitter], p=0.8),
                transforms.RandomGrayscale(p=0.2),
                Blur(blur),
                transforms.RandomApply([invert], p=solarize),
                transforms.ToTensor(),
                transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
            ]
        )

    first, second = chain(large, (0.4, 1.0), 1.0, 0.0), chain(large, (0.4, 1.0), 0.1, 0.2)
    local = chain(small, (0.05, 0.4), 0.5, 0.0)
    return lambda image: [first(image), second(image), *(local(image) for _ in range(num_local))]


class ReferenceData(torch.utils.data.Dataset[list[torch.Tensor]]):
    """Image files, or an array of images, with the reference transforms."""

    def __init__(self, images: list[str] | np.ndarray, sizes: tuple[int, int, int]) -> None:
        self.images, self.crops = images, reference(sizes)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> list[torch.Tensor]:
        image = self.images[index]
        if isinstance(image, np.ndarray):
            return self.crops(Image.fromarray(image))
        with Image.open(image) as opened:
            return self.crops(opened.convert("RGB"))


# --------------------------------------------------------------------------------------- ours


def data_module(source: Source, sizes: tuple[int, int, int], **settings: Any) -> DataModule:
    """Our loader with augmentation on the device, without a trainer."""
    multi_crop = MultiCrop(*sizes, where="device")
    return DataModule(Splits(source, None, "bench"), multi_crop, Normalize(), PART, **settings)


def steps(data: DataModule, num_steps: int) -> Iterator[Crops]:
    """Finished batches, as produced by the trainer's hook."""
    data.num_steps = num_steps
    for batch in data.train_dataloader():
        yield data.on_after_batch_transfer(batch, 0)


def parts(data: DataModule) -> Any:
    """The part done by workers: a data set indexed by (epoch, index) pairs."""
    return data.train_dataloader().loader.dataset


# ---------------------------------------------------------------------------------- measuring


def cpu_time(work: Callable[[], object]) -> float:
    """CPU seconds of this process that `work` takes."""
    started = time.process_time()
    work()
    return time.process_time() - started


def wall_time(work: Callable[[], object]) -> float:
    """Seconds that `work` takes."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def bench_worker(source: Source, files: list[str], rounds: int) -> dict[str, float]:
    """CPU milliseconds per image of a worker, ours and the reference's, and of our device part."""
    data, classic = data_module(source, LARGE), ReferenceData(files, LARGE)
    worker, num = parts(data), len(files)
    done: list[Part] = []
    ours_ms, reference_ms, device_ms = [], [], []
    for turn in range(rounds + 1):
        pairs = [(turn, i) for i in range(num)]
        done.clear()
        ours_ms.append(1e3 * cpu_time(lambda p=pairs: done.append(worker.__getitems__(p))) / num)
        batch = [done[0].crops.part(i, i + 8) for i in range(0, num, 8)]
        with torch.inference_mode():
            device_ms.append(
                1e3
                * cpu_time(lambda b=batch: [data.on_after_batch_transfer([x], 0) for x in b])
                / num
            )
        reference_ms.append(1e3 * cpu_time(lambda: [classic[i] for i in range(num)]) / num)
    return {  # the first round warms up
        "worker_cpu_ratio": ratio(reference_ms[1:], ours_ms[1:]),
        "worker_ms": statistics.median(ours_ms[1:]),
        "worker_reference_ms": statistics.median(reference_ms[1:]),
        "device_part_ms_on_cpu": statistics.median(device_ms[1:]),
    }


def bench_small(images: np.ndarray, rounds: int, threads: int) -> dict[str, float]:
    """Images/s of small images in memory, everything included, in one process with `threads`."""
    torch.set_num_threads(threads)
    num_steps, num_reference = 12, 256
    source = ArraySource(torch.from_numpy(images), None, [], "small")
    data, classic = data_module(source, SMALL), ReferenceData(images, SMALL)
    batches = DataLoader(classic, batch_size=PART, num_workers=0)
    ours_s, reference_s = [], []
    for _ in range(rounds + 1):
        with torch.inference_mode():
            ours_s.append(wall_time(lambda: list(steps(data, num_steps))) / (num_steps * PART))

        def some() -> None:
            loaded = iter(batches)
            for _ in range(num_reference // PART):
                next(loaded)

        reference_s.append(wall_time(some) / num_reference)
    torch.set_num_threads(1)
    return {
        "ratio": ratio(reference_s[1:], ours_s[1:]),
        "images_per_second": 1 / statistics.median(ours_s[1:]),
        "reference_images_per_second": 1 / statistics.median(reference_s[1:]),
    }


def ratio(reference_times: list[float], our_times: list[float]) -> float:
    """Median over rounds of reference / ours."""
    pairs = zip(reference_times, our_times, strict=True)
    return statistics.median(theirs / mine for theirs, mine in pairs)


def bench_workers(source: Source, num_workers: int, num_images: int = 512) -> float:
    """Photographs per second that worker processes deliver to the trainer."""
    data = data_module(source, LARGE, num_workers=num_workers)
    data.num_steps = num_images // PART + num_workers
    loaded = iter(data.train_dataloader())
    for _ in range(num_workers):  # exclude start-up
        next(loaded)
    return num_images / wall_time(lambda: list(loaded))


def step_appetite(batch_size: int = 4) -> float:
    """Images/s of only the forward and backward pass of a ViT-Ti/16 student on this CPU."""
    torch.set_num_threads(num_cores())
    vit = ViT(name="vit_tiny_patch16_224", image_size=224, patch_size=16)
    large, small, num_local = LARGE
    crops = torch.rand(2 * batch_size, 3, large, large)
    others = torch.rand(num_local * batch_size, 3, small, small)

    def step() -> None:
        (vit(crops).cls.sum() + vit(others).cls.sum()).backward()

    step()
    taken = min(wall_time(step) for _ in range(2))
    torch.set_num_threads(1)
    return batch_size / taken


# ---------------------------------------------------------------------------------------- data


def photos(folder: Path | None, scratch: Path) -> tuple[Source, list[str]]:
    """Open the photographs in `folder`, by default the 64 of ../shared/data."""
    if folder is None:
        with zipfile.ZipFile(SHARED / "imagenet_fullres_64.zip") as archive:
            archive.extractall(scratch)
        folder = scratch
    source = open_folder(folder, "none").train
    return source, [source.name(i) for i in range(len(source))]


def small_images(file: Path | None) -> np.ndarray:
    """CIFAR-10's first 5,000 training images, or x_train of an .npz."""
    archive = np.load(file or SHARED / "cifar10_webp.npz")
    if "x_train" in archive.files:
        return np.ascontiguousarray(archive["x_train"])
    tiles = np.asarray(Image.open(io.BytesIO(archive["train_webp_00"].tobytes())).convert("RGB"))
    return tiles.reshape(50, 32, 100, 32, 3).transpose(0, 2, 1, 3, 4).reshape(-1, 32, 32, 3).copy()


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--photos", type=Path, metavar="DIR", help="use these photographs")
    parser.add_argument("--small", type=Path, metavar="FILE", help=".npz with x_train, uint8")
    parser.add_argument("--compile", action="store_true", help="compile the device part")
    options = parser.parse_args()
    needed = [options.photos or SHARED / "imagenet_fullres_64.zip"]
    needed += [options.small or SHARED / "cifar10_webp.npz"]
    if missing := [str(path) for path in needed if not path.exists()]:
        print(f"{missing[0]} does not exist: give --photos DIR, --small FILE.npz", file=sys.stderr)
        return 2
    if options.compile:
        ours.photometric = torch.compile(ours.photometric, dynamic=False)
    torch.set_num_threads(1)
    found: dict[str, Any] = {"rounds": options.rounds, "compiled": options.compile}
    with tempfile.TemporaryDirectory() as scratch:
        source, files = photos(options.photos, Path(scratch))
        found |= bench_worker(source, files, options.rounds)
        per_core = [bench_workers(source, num) for num in (1, 2)]
    for threads in sorted({1, min(2, num_cores())}):
        small = bench_small(small_images(options.small), options.rounds, threads)
        found[f"small_images_{threads}_threads"] = small
    found["small_images_ratio"] = found["small_images_1_threads"]["ratio"]
    found["images_per_second_1_worker"], found["images_per_second_2_workers"] = per_core
    found["images_per_second_16_cores"] = 16e3 / found["worker_ms"]
    found["step_images_per_second"] = step_appetite()
    for key, value in found.items():
        print(f"{key:32s} {value if isinstance(value, dict | bool) else round(value, 3)}")
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
