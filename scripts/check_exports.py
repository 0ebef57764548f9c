#!/usr/bin/env python3
"""Write networks of every family in every format, read each back without dino_lite, and time it.

    scripts/check_exports.py [--json FILE] [--data FOLDER] [--only NETWORK ...] [--format NAME ...]

Weights are random, and generic: no bias, scale or running mean is a zero or one that hides a part.
The images are eight photographs of --data, by default of ../shared/data if it is there, else of the
embedded set. A row per format and network:

* difference: the largest, relative to the tokens' root mean square, over batches of one and eight
  and all sizes that the format claims; `dino-lite export` checks the same
* images_per_second of eight images at the first size: the fastest of three runs; of_eager is its
  ratio to the original's in eager mode, the fastest of two runs before and two after

Refused formats are listed with their reasons. Exits with 1 if a file names a folder of this
machine, or if a format fails otherwise than by a sentence. OMP_NUM_THREADS sets the number of
threads.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import traceback
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from step_process import machine

from dino_lite.backbones.convnet import ConvNet
from dino_lite.backbones.rope import RoPEViT
from dino_lite.backbones.vit import ViT
from dino_lite.config import config_dir, instantiate, load
from dino_lite.contracts import Backbone, UserError
from dino_lite.data.folder import open_folder
from dino_lite.data.preprocessing import Preprocessing
from dino_lite.data.shapes import open_shapes
from dino_lite.formats.format import Format
from dino_lite.formats.opened import Opened
from dino_lite.formats.publish import publish
from dino_lite.formats.verify import Original, demand_packages

NETWORKS: dict[str, tuple[Any, int, dict[str, Any]]] = {  # class, image size, settings
    "ViT-S/16": (ViT, 224, {"name": "vit_small_patch16_224"}),
    "ViT-S/14, 4 registers": (
        ViT,
        224,
        {"name": "vit_small_patch14_reg4_dinov2", "patch_size": 14},
    ),
    "ViT-S/16, rotary": (RoPEViT, 224, {"name": "vit_small_patch16_dinov3"}),
    "ConvNeXt-T": (ConvNet, 224, {"name": "convnext_tiny", "norm": "layer"}),
    "ResNet-50": (ConvNet, 224, {"name": "resnet50"}),
    "small convnet": (
        ConvNet,
        64,
        {"widths": [32, 64], "depths": [1, 1], "fields": 4, "patch_size": 4},
    ),
}
NUM_IMAGES, REPEATS = 8, 3
PHOTOS = Path(__file__).resolve().parents[2] / "shared" / "data" / "imagenet_fullres_64.zip"


def generic(name: str) -> tuple[Backbone, int]:
    """The network `name` with generic weights of a scale that training might give, and its size."""
    family, size, settings = NETWORKS[name]
    sized = {"image_size": size} if family is ViT else {}
    torch.manual_seed(0)
    backbone: Backbone = family(**settings, **sized)
    with torch.no_grad():
        for key, parameter in backbone.named_parameters():
            if key.endswith(("gamma", "gamma_1", "gamma_2")):  # of LayerScale, small at first
                parameter.copy_(0.1 + 0.02 * torch.randn_like(parameter))
            else:
                scale = 0.1 if parameter.ndim < 2 else 0.2 * float(parameter.std())
                parameter.add_(scale * torch.randn_like(parameter))
        for key, buffer in backbone.named_buffers():
            if key.endswith("running_mean"):
                buffer.copy_(0.1 * torch.randn_like(buffer))
            elif key.endswith("running_var"):
                buffer.copy_(0.5 + torch.rand_like(buffer))
    return backbone.eval(), size


def pictures(data: Path | None, scratch: Path, size: int) -> list[np.ndarray]:
    """Eight photographs, else embedded images of `size` x `size` pixels."""
    if data is None and PHOTOS.is_file() and not (scratch / "photos").is_dir():
        with zipfile.ZipFile(PHOTOS) as archive:
            names = [n for n in archive.namelist() if n.lower().endswith((".jpg", ".jpeg", ".png"))]
            archive.extractall(scratch / "photos", names[:NUM_IMAGES])
    folder = data or (scratch / "photos")
    source = (open_folder(folder) if folder.is_dir() else open_shapes(image_size=size)).train
    return [source.read(index % len(source)) for index in range(NUM_IMAGES)]


def eager(backbone: Backbone, pixels: torch.Tensor) -> float:
    """Seconds of the faster of two runs."""
    times = []
    with torch.no_grad():
        for _ in range(2):
            began = time.perf_counter()
            backbone(pixels)
            times.append(time.perf_counter() - began)
    return min(times)


def leaks(folder: Path) -> list[str]:
    """Files of an export that name a folder of this machine."""
    secrets = [str(each) for each in (Path.cwd(), sys.prefix, tempfile.gettempdir())]
    secrets += [f"{Path.home()}/"]
    return [
        f"{path.name} names {secret}"
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        for secret in secrets
        if len(secret) > 3 and secret.encode() in path.read_bytes()
    ]


def row(
    name: str, form: Format, original: Original, opened: Opened, target: Path
) -> dict[str, Any]:
    """One row of the table. Raises UserError if the format is refused."""
    before = eager(original.backbone, original.images)
    began = time.perf_counter()
    about = publish(form, opened, target, original, repeats=REPEATS)
    spent = time.perf_counter() - began
    seconds = min(before, eager(original.backbone, original.images))
    checks = about["verification"]["checks"]
    titles = list(dict.fromkeys(check["title"] for check in checks))
    first = next(check for check in checks if check["batch"] == NUM_IMAGES)
    sizes = list(dict.fromkeys("x".join(map(str, check["size"])) for check in checks))
    return {
        "network": name,
        "format": form.name,
        "titles": titles,
        "sizes": sizes,
        "difference": about["largest_difference"],
        "pixels": about["verification"]["pixels"],
        "images_per_second": NUM_IMAGES / first["seconds"],
        "of_eager": seconds / first["seconds"],
        "megabytes": sum(p.stat().st_size for p in target.rglob("*") if p.is_file()) / 1e6,
        "seconds": spent,
        "leaks": leaks(target),
    }


def as_table(rows: list[dict[str, Any]]) -> str:
    """The table of docs/export.md."""
    head = "| network | format | largest difference | sizes | images/s | of eager |"
    lines = [head, "| --- | --- | --- | --- | --- | --- |"]
    for each in rows:
        lines.append(
            f"| {each['network']} | {each['format']} | {each['difference']:.1e} | "
            f"{', '.join(each['sizes'])} | {each['images_per_second']:.0f} | "
            f"{each['of_eager']:.2f} |"
        )
    return "\n".join(lines)


def main() -> int:
    """Run the checks."""
    known = sorted(path.stem for path in (config_dir() / "format").glob("*.yaml"))
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--only", nargs="+", choices=[*NETWORKS], default=[*NETWORKS])
    parser.add_argument("--format", nargs="+", choices=known, default=known)
    asked = parser.parse_args()
    nodes = {name: load(config_dir() / "format" / f"{name}.yaml")[name] for name in asked.format}
    formats: dict[str, Format] = {name: instantiate(node) for name, node in nodes.items()}
    demand_packages(formats)
    rows: list[dict[str, Any]] = []
    refused: list[str] = []
    failed: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        for name in asked.only:
            backbone, size = generic(name)
            opened = Opened(backbone, Preprocessing((size, size)), {"checkpoint": name})
            original = Original(opened, pictures(asked.data, Path(folder), size))
            for form in formats.values():
                target = Path(folder) / "export" / name.replace("/", "_") / form.name
                try:
                    rows.append(row(name, form, original, opened, target))
                    print(as_table(rows[-1:]).splitlines()[-1], flush=True)
                except UserError as error:
                    refused.append(f"{name}, {form.name}: {error}")
                except Exception:
                    failed.append(f"{name}, {form.name}: {traceback.format_exc()}")
    about = f"{machine()}, torch {torch.__version__}"
    print(f"\n{as_table(rows)}\n\n{about}")
    leaked = [
        f"{each['network']}, {each['format']}: {each['leaks']}" for each in rows if each["leaks"]
    ]
    for title, lines in (("refused", refused), ("failed", failed), ("leaks", leaked)):
        if lines:
            print(f"\n{title}:\n" + "\n".join(f"* {line}" for line in lines))
    if asked.json:
        told = {"machine": about, "rows": rows, "refused": refused, "failed": failed}
        asked.json.write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
    return int(bool(failed or leaked))


if __name__ == "__main__":
    sys.exit(main())
