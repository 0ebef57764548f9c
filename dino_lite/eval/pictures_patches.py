"""Pictures of patch tokens: principal components as colors, and segmentations."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from PIL import ImageColor
from torch import Tensor

from dino_lite.contracts import Backbone, UserError
from dino_lite.data.photometric import Normalize
from dino_lite.eval.features import device_of, dtype_of, frozen
from dino_lite.eval.heat import gray, palette
from dino_lite.eval.sheets import WIDTH, Cell, Heading, Row, as_rgb, draw_sheet, rgb

_ACROSS = 2  # images per row of the sheet
_EMPTY = 255  # white, for the background


def pca_picture(
    backbone: Backbone,
    images: Float[Tensor, "n C H W"],
    path: str | Path,
    normalize: Normalize | None = None,
) -> None:
    """Images beside the first three principal components of their patch tokens as red, green and
    blue; computed over all patches of all images, and again over those of the foreground (Oquab et
    al. 2024, figure 1).
    """
    found = []
    with frozen(backbone):
        for image in images.to(device_of(backbone), dtype_of(backbone)):
            tokens = backbone(image[None])
            found.append(tokens.patches.float().cpu())
    features, grid = torch.cat(found), tokens.grid
    chosen = foreground(features, grid)
    maps = []
    for mask in (torch.ones_like(chosen), chosen):
        colors = np.full((*chosen.shape, 3), _EMPTY, np.uint8)
        if int(mask.sum()) > 3:
            shares = component_colors(features[mask])
            colors[mask.numpy()] = (255 * shares).round().to(torch.uint8).numpy()
        maps.append(colors.reshape(len(images), *grid, 3))
    cells = [
        [[Cell(pixels, WIDTH)] for pixels in row]
        for row in zip(rgb(images[None], normalize)[0], *maps, strict=True)
    ]
    across = _ACROSS if len(cells) % _ACROSS == 0 else 1
    rows: list[Row] = [
        [group for cell in cells[i : i + across] for group in cell]
        for i in range(0, len(cells), across)
    ]
    headings = [
        Heading("Image", f"{images.shape[-1]} px"),
        Heading("Patches", f"{grid[1]}\u00d7{grid[0]}"),
        Heading("Foreground", "its own components"),
    ]
    draw_sheet(rows, path, "Patch features: principal components as colors", headings * across)


def components(rows: Float[Tensor, "n D"], num: int) -> Float[Tensor, "n num"]:
    """The first principal components, largest first; signs make each largest loading positive."""
    rows = rows.double()
    rows = rows - rows.mean(dim=0)
    _, vectors = torch.linalg.eigh(rows.T @ rows)
    vectors = vectors[:, -num:].flip(1)
    largest = vectors.abs().argmax(dim=0, keepdim=True)
    found: Tensor = rows @ (vectors * vectors.gather(0, largest).sign())
    return found


def component_colors(rows: Float[Tensor, "n D"]) -> Float[Tensor, "n 3"]:
    """Three components, each scaled from its 1st percentile (0) to its 99th (1)."""
    if rows.shape[1] < 3:
        raise UserError("colors need at least 3 features.")
    found = components(rows, 3)
    low, high = torch.from_numpy(np.percentile(found.numpy(), (1, 99), axis=0))
    shares: Tensor = (found - low) / (high - low).clamp(min=1e-12)
    return shares.clamp(0, 1)


def foreground(features: Float[Tensor, "n P D"], grid: tuple[int, int]) -> Bool[Tensor, "n P"]:
    """The patches on one side of a threshold on the first component: the side that is more frequent
    in the middle of images than along their edges.

    The threshold minimizes the variance within both sides (Otsu 1979).
    """
    first = components(features.flatten(0, 1), 1)[:, 0]
    ordered = first.sort().values
    size = torch.arange(1, len(first))
    total = ordered.cumsum(0)[:-1]  # of the lower side; of both it is 0
    between = total**2 * len(first) / (size * (len(first) - size))
    above = (first > ordered[between.argmax()]).reshape(-1, *grid)
    margins = [side // 4 for side in grid]
    middle = above[:, margins[0] : grid[0] - margins[0], margins[1] : grid[1] - margins[1]]
    if middle.double().mean() < above.double().mean():
        above = ~above
    return above.flatten(1)


def segmentation_picture(
    images: Sequence[UInt8[np.ndarray, "H W C"]],
    truths: Sequence[Int[np.ndarray, "H W"]],
    predictions: Sequence[Int[np.ndarray, "H W"]],
    classes: Sequence[str],
    path: str | Path,
    title: str = "What a linear head sees in patch features",
) -> None:
    """A row per image: image, mask and prediction, as colors on gray.

    Masks hold indices into `classes`, -1 for unlabeled pixels.
    """
    colors = palette(len(classes))
    rows: list[Row] = []
    for image, truth, predicted in zip(images, truths, predictions, strict=True):
        pixels = as_rgb(image)
        drawn = [pixels, painted(pixels, truth, colors), painted(pixels, predicted, colors)]
        rows.append([[Cell(cell, 2 * WIDTH)] for cell in drawn])
    headings = [
        Heading("Image", f"{images[0].shape[1]}\u00d7{images[0].shape[0]} px"),
        Heading("Mask", "gray: no class"),
        Heading("Predicted", "by the class of each pixel"),
    ]
    draw_sheet(rows, path, title, headings, list(zip(colors, classes, strict=True)))


def painted(
    image: UInt8[np.ndarray, "H W 3"], classes: Int[np.ndarray, "H W"], colors: Sequence[str]
) -> UInt8[np.ndarray, "H W 3"]:
    """The image in gray, overlaid with the color of each pixel's class."""
    table = np.array([ImageColor.getrgb(color)[:3] for color in colors], dtype=np.float64)
    luma = np.repeat(gray(image), 3, axis=-1)
    known = classes >= 0
    luma[known] = 0.4 * luma[known] + 0.6 * table[classes[known]]
    return luma.astype(np.uint8)
