"""Pictures of a run: the crops it learns from, what its backbone attends to, which images it finds alike, its curves."""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Shaped, UInt8
from PIL import Image, ImageOps
from torch import Tensor, nn

from dino_lite.contracts import Backbone, Crops, Source, UserError
from dino_lite.eval.features import Features, device_of, dtype_of, frozen
from dino_lite.eval.knn import nearest, unit

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_INK, _GRAY, _LIGHT = "#1f2933", "#7b8794", "#e4e7eb"
_BLUE, _ORANGE = "#1769aa", "#d9762b"  # told apart by the color-blind too: same class and other class, k-NN and loss
_DPI = 150
_GAP = 0.06  # inches between two pictures of a grid
_STYLE: dict[str, Any] = {
    "font.family": "sans-serif",
    "font.size": 8,
    "text.color": _INK,
    "axes.edgecolor": _GRAY,
    "axes.labelcolor": _GRAY,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": _GRAY,
    "ytick.color": _GRAY,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "figure.facecolor": "white",
}


class Cell:
    """One picture of a grid: pixels, how much of its column it fills, a frame, a line of text below it."""

    def __init__(
        self,
        pixels: UInt8[np.ndarray, "h w 3"],
        scale: float = 1.0,
        frame: str | None = None,
        below: str = "",
    ) -> None:
        self.pixels, self.scale, self.frame, self.below = pixels, scale, frame, below


def crops_picture(
    crops: Crops, normalize: nn.Module | None, path: str | Path, num_images: int = 6
) -> None:
    """What student and teacher see: a row an image, global crops then local ones, sizes true to each other."""
    crops = crops.part(0, min(num_images, crops.num_images))
    globals_ = _to_uint8(crops.globals_.flatten(0, 1), normalize).reshape(
        len(crops.globals_), crops.num_images, *crops.globals_.shape[-2:], 3
    )
    columns = [(image, 1.0) for image in globals_]
    num_local = 0
    if crops.locals_ is not None:
        num_local = len(crops.locals_)
        pixels = _to_uint8(crops.locals_.flatten(0, 1), normalize)
        shape = (num_local, crops.num_images, *crops.locals_.shape[-2:], 3)
        scale = max(0.35, crops.locals_.shape[-1] / crops.globals_.shape[-1])
        columns += [(image, scale) for image in pixels.reshape(shape)]
    rows = [
        [Cell(column[i], frame=None, scale=1.0) for column, _ in columns]
        for i in range(crops.num_images)
    ]
    widths = [1.15 * scale for _, scale in columns]
    size = "{0}×{0}".format
    spans = [(0, len(globals_), f"student and teacher: {len(globals_)} global crops, {size(globals_.shape[-2])}")]
    if num_local:
        spans.append(
            (len(globals_), len(columns), f"student alone: {num_local} local crops, {size(crops.locals_.shape[-1])}")  # type: ignore[union-attr]
        )
    _grid(rows, widths, path, spans=spans)
