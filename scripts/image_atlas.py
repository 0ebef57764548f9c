#!/usr/bin/env python3
"""Pack small images of an .npz into a few large JPEGs, to transfer them in less space; and unpack.

    scripts/image_atlas.py pack SMALL.npz OUT.npz [--quality 95]
    scripts/image_atlas.py unpack ATLAS.npz OUT.npz

SMALL.npz contains x_train, y_train, x_test, y_test (uint8, all images of one size), or atlases:
{train,test}_{webp,jpeg}_NN, each 50 x 100 images in rows. JPEGs of quality 95 without subsampling
take a third of the bytes of the pixels, with errors of 2 levels: suitable for timing, and for k-NN
accuracies that are not compared with published ones to 0.1 %.
"""

from __future__ import annotations

import argparse
import io
import re
import sys
from pathlib import Path

import numpy as np
from PIL import Image

ROWS, COLUMNS = 50, 100  # images per atlas


def read(file: Path) -> dict[str, np.ndarray]:
    """Read x_train, y_train, x_test, y_test, as arrays or atlases."""
    with np.load(file, allow_pickle=False) as archive:
        found = {key: archive[key] for key in archive.files}
    arrays = {key: value for key, value in found.items() if re.fullmatch("[xy]_(train|test)", key)}
    for split in ("train", "test"):
        atlases = sorted(key for key in found if re.fullmatch(rf"{split}_(webp|jpeg)_\d+", key))
        if atlases:
            arrays[f"x_{split}"] = np.concatenate([tiles(found[key]) for key in atlases])
            arrays[f"x_{split}"] = arrays[f"x_{split}"][: len(arrays[f"y_{split}"])]
    return arrays


def tiles(encoded: np.ndarray) -> np.ndarray:
    """The images "n h w 3" of an encoded atlas."""
    atlas = np.asarray(Image.open(io.BytesIO(encoded.tobytes())).convert("RGB"))
    height, width = atlas.shape[0] // ROWS, atlas.shape[1] // COLUMNS
    cut = atlas.reshape(ROWS, height, COLUMNS, width, 3).transpose(0, 2, 1, 3, 4)
    return cut.reshape(-1, height, width, 3)


def packed(arrays: dict[str, np.ndarray], quality: int) -> dict[str, np.ndarray]:
    """Pack into atlases and labels; the last atlas is padded with black."""
    out = {key: value for key, value in arrays.items() if key.startswith("y_")}
    for split in ("train", "test"):
        images = arrays[f"x_{split}"]
        _, height, width, _ = images.shape
        for i, start in enumerate(range(0, len(images), ROWS * COLUMNS)):
            part = images[start : start + ROWS * COLUMNS]
            part = np.pad(part, [(0, ROWS * COLUMNS - len(part)), (0, 0), (0, 0), (0, 0)])
            atlas = part.reshape(ROWS, COLUMNS, height, width, 3).transpose(0, 2, 1, 3, 4)
            file = io.BytesIO()
            image = Image.fromarray(atlas.reshape(ROWS * height, COLUMNS * width, 3))
            image.save(file, "JPEG", quality=quality, subsampling=0, optimize=True)
            out[f"{split}_jpeg_{i:02d}"] = np.frombuffer(file.getvalue(), np.uint8)
    return out


def main(arguments: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("do", choices=("pack", "unpack"))
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--quality", type=int, default=95)
    options = parser.parse_args(arguments)
    if not options.source.is_file():
        print(f"{options.source} does not exist", file=sys.stderr)
        return 2
    arrays = read(options.source)
    if options.do == "pack":
        arrays = packed(arrays, options.quality)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    np.savez(options.out, **arrays)
    print(f"{options.out}: {options.out.stat().st_size / 2**20:.1f} MiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
