"""Pictures of crops, attention and nearest neighbors."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dino_lite.contracts import Backbone, Crops, Source
from dino_lite.data.clean import CleanData
from dino_lite.data.photometric import Normalize
from dino_lite.eval.features import Features, device_of, dtype_of, frozen
from dino_lite.eval.heat import heat, overlay
from dino_lite.eval.neighbors import nearest
from dino_lite.eval.sheets import (
    BLUE,
    GAP,
    ORANGE,
    WIDTH,
    Cell,
    Heading,
    Row,
    draw_sheet,
    drawn,
    rgb,
    thumbnail,
)


def crops_picture(
    crops: Crops, normalize: Normalize | None, path: str | Path, num_images: int = 6
) -> None:
    """Crops that student and teacher see: a row per image, global crops then local ones, sizes to
    scale.

    `crops` are uint8, or floats normalized by `normalize` (mean, std).
    """
    crops = crops.part(0, num_images)
    large = rgb(crops.globals_, normalize)
    side = large.shape[-2]
    width = drawn(side)
    rows: list[Row] = [[[Cell(crop[i], width) for crop in large]] for i in range(crops.num_images)]
    headings = [Heading("Student and teacher", f"{len(large)} global crops of {side} px")]
    if crops.locals_ is not None:
        small = rgb(crops.locals_, normalize)
        small_side = small.shape[-2]
        for i, row in enumerate(rows):
            row.append([Cell(crop[i], width * small_side // side) for crop in small])
        headings.append(Heading("Student alone", f"{len(small)} local crops of {small_side} px"))
    draw_sheet(rows, path, "What student and teacher see", headings)


def attention_picture(
    backbone: Backbone,
    images: Float[Tensor, "n C H W"],
    path: str | Path,
    normalize: Normalize | None = None,
    num_heads: int | None = 6,
) -> None:
    """Attention of the class token: image, mean over the last block's heads overlaid, single heads
    (None: all).
    """
    with frozen(backbone):
        attention = backbone.attention(images.to(device_of(backbone), dtype_of(backbone)))
    grid = [side // backbone.patch_size for side in images.shape[-2:]]
    to_patches = attention[:, :, 0, -math.prod(grid) :]  # n heads P: patches are the last tokens
    maps = to_patches.float().cpu().reshape(*to_patches.shape[:2], *grid)  # n heads h w
    pixels = rgb(images[None], normalize)[0]
    width = drawn(pixels.shape[-2])
    shown = min(num_heads or maps.shape[1], maps.shape[1])
    rows: list[Row] = [
        [
            [Cell(image, width)],
            [Cell(overlay(image, heads.mean(dim=0)), width)],
            [Cell(heat(head), (width - GAP) // 2) for head in heads[:shown]],
        ]
        for image, heads in zip(pixels, maps, strict=True)
    ]
    headings = [
        Heading("Image", f"{images.shape[-1]} px"),
        Heading("Attention", f"mean of {maps.shape[1]} heads"),
        Heading("Single heads", f"the first {shown}" if shown < maps.shape[1] else f"all {shown}"),
    ]
    draw_sheet(rows, path, "Where the class token looks, last block", headings)


def neighbors_picture(
    bank: Features,
    data: CleanData,
    path: str | Path,
    queries: Features | None = None,
    num_queries: int = 6,
    num_neighbors: int = 8,
) -> None:
    """Query images with their nearest neighbors in train; frames show whether classes agree.

    `bank` and `queries` are the features of data's train and test; without queries, rows of the
    bank are the queries. They are spread evenly over classes (over the set without labels), not
    selected by hand.
    """
    train = data.splits.train
    asked, images = bank, train
    if queries is not None and data.splits.test is not None:
        asked, images = queries, data.splits.test
    in_bank, in_images = bank.places.tolist(), asked.places.tolist()
    rows = spread_over_classes(asked.labels, num_queries)
    similarity, index = nearest(
        asked.features[rows],
        bank.features,
        min(num_neighbors, len(bank.labels) - (asked is bank)),
        exclude=rows if asked is bank else None,
    )
    sheet: list[Row] = []
    for row, alike, found in zip(rows.tolist(), similarity.tolist(), index.tolist(), strict=True):
        label, cells = int(asked.labels[row]), []
        for value, neighbor in zip(alike, found, strict=True):
            other, width = int(bank.labels[neighbor]), WIDTH * 5 // 8
            frame = None if min(label, other) < 0 else BLUE if label == other else ORANGE
            pixels = thumbnail(train, in_bank[neighbor], width)
            cells.append(Cell(pixels, width, frame, f"{value:.3f}"))
        pixels = thumbnail(images, in_images[row], WIDTH * 3 // 4)
        query = Cell(pixels, WIDTH * 3 // 4, None, class_name(images, label))
        sheet.append([[query], cells])
    known = bool((bank.labels >= 0).any())
    whence = "train" if asked is bank else "test"
    headings = [Heading("Query", whence), Heading("Nearest in train", "cosine similarity")]
    legend = [(BLUE, "same class"), (ORANGE, "another class")] if known else []
    draw_sheet(sheet, path, "Nearest neighbors in the features", headings, legend, stack=False)


def class_name(source: Source, label: int) -> str:
    """The name of a class, "" if it has none."""
    return source.classes[label] if 0 <= label < len(source.classes) else ""


def spread_over_classes(labels: Int[Tensor, "N"], count: int) -> Int[Tensor, "n"]:
    """Rows of at most `count` images: the middle one of different classes, if there are labels."""
    classes = sorted(set(labels.tolist()))
    if len(classes) < 2:
        return torch.linspace(0, len(labels) - 1, min(count, len(labels))).long()
    chosen = torch.linspace(0, len(classes) - 1, min(count, len(classes))).long().tolist()
    rows = [(labels == classes[place]).nonzero()[:, 0] for place in chosen]
    return torch.stack([of_class[len(of_class) // 2] for of_class in rows])
