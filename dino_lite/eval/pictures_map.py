"""A two-dimensional map of images by their features."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image, ImageDraw
from torch import Tensor

from dino_lite.contracts import Source, UserError
from dino_lite.data.subset import spread
from dino_lite.eval.features import Features
from dino_lite.eval.heat import palette
from dino_lite.eval.neighbors import unit
from dino_lite.eval.pictures import class_name
from dino_lite.eval.sheets import GRAY, INK, LINE, MARGIN, font, save_page, start_page, thumbnail

_SIDE = 1440  # pixels of the map
_TOP = 108
_NUM_COMPONENTS = 50  # principal components before t-SNE (van der Maaten 2008, section 4.2)
_MOST_NAMED = 40  # at most, classes named on the map


def map_picture(
    features: Features,
    source: Source,
    path: str | Path,
    num_images: int = 1000,
    method: str = "t-SNE",
    width: int = 48,
) -> None:
    """Images at their positions on a map of their features, as thumbnails where there is room, else
    as dots; frames and dots have the color of the class, whose name is written in its middle.

    At most `num_images` rows of `features` (of `source`), evenly spread. `method`: t-SNE or UMAP,
    which needs umap-learn.
    """
    rows = torch.from_numpy(spread(len(features.labels), num_images))
    chosen = features.rows(rows)
    if len(chosen.labels) < 5:
        raise UserError("a map needs 5 images or more.")
    points = _on_page(project(chosen.features, method), width)
    labels = chosen.labels.tolist()
    colors = _class_colors(labels)
    page, draw = start_page(MARGIN + _SIDE, _TOP + _SIDE + MARGIN, "Images by their features")
    draw.text(
        (MARGIN, 66),
        f"{method} of {len(labels):,} images; only near is meant, not far",
        GRAY,
        font(16),
    )
    thumbnails = _apart(points, width + 8)
    for row in sorted(set(range(len(points))) - set(thumbnails)):
        x, y = points[row].tolist()
        draw.ellipse((x - 7, y - 7, x + 7, y + 7), colors.get(labels[row], GRAY), "white", 2)
    numbers = chosen.places.tolist()
    for row in thumbnails:
        x, y = (round(value - width / 2) for value in points[row].tolist())
        box = (x - 3, y - 3, x + width + 2, y + width + 2)
        draw.rounded_rectangle(box, 4, colors.get(labels[row], LINE))
        page.paste(Image.fromarray(thumbnail(source, numbers[row], width)), (x, y))
    if len(colors) <= _MOST_NAMED:
        _draw_names(draw, points, labels, {i: class_name(source, i) for i in colors})
    save_page(page, path)


def project(features: Float[Tensor, "n D"], method: str = "t-SNE") -> Float[np.ndarray, "n 2"]:
    """Deterministic positions in the plane for unit features; neighbors stay neighbors."""
    rows = unit(features).double()
    rows = rows - rows.mean(dim=0)
    if min(rows.shape) > _NUM_COMPONENTS:
        _, vectors = torch.linalg.eigh(rows.T @ rows)
        rows = rows @ vectors[:, -_NUM_COMPONENTS:]
    array = rows.float().numpy()
    if method == "UMAP":
        if find_spec("umap") is None:
            raise UserError("UMAP needs umap-learn: pip install umap-learn, or choose t-SNE.")
        reducer: Any = import_module("umap").UMAP(
            n_neighbors=min(15, len(array) - 1), random_state=0, n_jobs=1
        )
    elif method == "t-SNE":
        from sklearn.manifold import TSNE

        perplexity = min(30.0, (len(array) - 1) / 3)
        init = "pca" if min(array.shape) > 1 else "random"
        reducer = TSNE(perplexity=perplexity, init=init, random_state=0)
    else:
        raise UserError(f"A map is drawn by t-SNE or UMAP, not by {method}.")
    return np.asarray(reducer.fit_transform(array), dtype=np.float64)


def _on_page(points: Float[np.ndarray, "n 2"], width: int) -> Float[np.ndarray, "n 2"]:
    """Positions in pixels: the middle 99.6 % of each axis fill the map, outliers are clamped to its
    edge.
    """
    low, high = np.percentile(points, (0.2, 99.8), axis=0)
    share = np.clip((points - low) / np.maximum(high - low, 1e-12), 0, 1)
    return np.asarray(share * (_SIDE - width) + width / 2 + np.array([MARGIN, _TOP]))


def _apart(points: Float[np.ndarray, "n 2"], width: int) -> list[int]:
    """Rows whose squares of `width` do not overlap an earlier one, in an order independent of
    class.
    """
    found: list[int] = []
    for row in np.random.default_rng(0).permutation(len(points)).tolist():
        if not found or (np.abs(points[found] - points[row]).max(axis=1) >= width).all():
            found.append(row)
    return found


def _draw_names(
    draw: ImageDraw.ImageDraw,
    points: Float[np.ndarray, "n 2"],
    labels: list[int],
    names: dict[int, str],
) -> None:
    """Each class's name at its densest place, moved down if it would cover another."""
    size, taken = 22, list[tuple[float, float, float]]()  # x, y, half a width
    middles = {i: _densest(points[np.array(labels) == i]) for i in names}
    for i in sorted(names, key=lambda i: float(middles[i][1])):
        x, y = middles[i].tolist()
        half = font(size, True).getlength(names[i]) / 2
        x = min(max(x, MARGIN + half), MARGIN + _SIDE - half)
        while any(abs(x - a) < half + b and abs(y - c) < size + 6 for a, c, b in taken):
            y += 4
        taken.append((x, y, half))
        draw.text(
            (x, y), names[i], INK, font(size, True), "mm", stroke_width=4, stroke_fill="white"
        )


def _densest(points: Float[np.ndarray, "n 2"]) -> Float[np.ndarray, "2"]:
    """The center of the few points nearest to each other."""
    apart = np.linalg.norm(points[:, None] - points[None], axis=2)
    nearest = np.sort(apart, axis=1)[:, : 1 + len(points) // 4]
    center = int(nearest.mean(axis=1).argmin())
    return np.asarray(points[np.argsort(apart[center])[: nearest.shape[1]]].mean(axis=0))


def _class_colors(labels: list[int]) -> dict[int, str]:
    """A color per class; none if there is at most one class."""
    classes = sorted(set(labels) - {-1})
    return dict(zip(classes, palette(len(classes)), strict=True)) if len(classes) > 1 else {}
