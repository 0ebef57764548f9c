#!/usr/bin/env python3
"""Draw a contact sheet of every augmentation preset: `draw_presets.py [FOLDER] [--out DIR]`.

Each row shows an image of FOLDER (default: the embedded set), its two global crops and its local
crops, as made by `augment=NAME`. Images are evenly spaced over the folder, and converted to gray
for presets for images without color.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
from jaxtyping import UInt8  # noqa: E402

from dino_lite.config import compose, config_dir, instantiate, put  # noqa: E402
from dino_lite.contracts import Splits, UserError  # noqa: E402
from dino_lite.data import exact  # noqa: E402
from dino_lite.data.crops import MultiCrop  # noqa: E402
from dino_lite.data.folder import open_folder  # noqa: E402
from dino_lite.data.shapes import open_shapes  # noqa: E402
from dino_lite.data.subset import spread  # noqa: E402
from dino_lite.eval.sheets import Cell, Heading, Row, draw_sheet  # noqa: E402

Pixels = UInt8[np.ndarray, "h w 3"]

SIZES = {"global_size": 112, "local_size": 48, "num_local": 6}  # pixels: half of the paper's
BLUR_RADIUS = [0.05, 1.0]  # also half
ENLARGED = 2
COLORLESS = ("grayscale", "medical")


def build(name: str) -> MultiCrop:
    """The multi-crop that `augment=name` configures, in the sizes of the sheet."""
    config = compose("pretrain", [f"augment={name}"])["augment"] | SIZES | {"where": "worker"}
    for kind in ("global_1", "global_2", "local"):
        config = put(config, f"{kind}.blur_radius", BLUR_RADIUS)
    told = {key: value for key, value in config.items() if value != "auto"}  # those: the paper's
    multi_crop: MultiCrop = instantiate(told)
    return multi_crop


def without_color(image: Pixels) -> Pixels:
    """Convert to gray: luma in all three channels."""
    luma = image @ np.array([0.299, 0.587, 0.114])
    return np.repeat(np.rint(luma)[..., None], 3, axis=-1).astype(np.uint8)


def draw_preset(name: str, images: list[Pixels], path: Path) -> None:
    """Draw the sheet, one row per image: the image, global crops, local crops."""
    if name in COLORLESS:
        images = [without_color(image) for image in images]
    multi_crop, num = build(name), len(images)
    sides = np.array([image.shape[:2] for image in images])
    drawn = multi_crop.draw(np.zeros(num, np.int64), np.arange(num), *sides.T)
    crops = [np.empty((num, size, size, 3), np.uint8) for size in multi_crop.sizes]
    exact.make_crops(images, drawn, crops)
    rows: list[Row] = []
    for i, image in enumerate(images):
        cells = [Cell(crop[i], ENLARGED * crop.shape[1]) for crop in crops]
        rows.append([[Cell(image, cells[0].width)], cells[:2], cells[2:]])
    headings = [
        Heading("Image", f"{sides[0][1]}\u00d7{sides[0][0]} px"),
        Heading("Student and teacher", f"2 global crops of {SIZES['global_size']} px"),
        Heading("Student alone", f"{SIZES['num_local']} local crops of {SIZES['local_size']} px"),
    ]
    draw_sheet(rows, path, f"augment={name}", headings)


def open_images(folder: Path | None, num_images: int) -> list[Pixels]:
    """A few images of the folder's training split, or of the embedded set."""
    splits: Splits
    if folder is None:
        splits = open_shapes(num_train=num_images, num_test=0, image_size=SIZES["global_size"])
    else:
        splits = open_folder(folder)
    return [splits.train.read(i) for i in spread(len(splits.train), num_images).tolist()]


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?", help="of images; default: the embedded set")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "augment", metavar="DIR")
    parser.add_argument("--num-images", type=int, default=4, metavar="N", help="rows of a sheet")
    options = parser.parse_args(arguments)
    try:
        images = open_images(options.folder, options.num_images)
        for preset in sorted((config_dir() / "augment").glob("*.yaml")):
            path = options.out / f"{preset.stem}.png"
            draw_preset(preset.stem, images, path)
            print(path)
    except (UserError, OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
