"""Pictures of a run: its crops, what its backbone attends to, and which images it finds alike."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped, UInt8
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

from dino_lite.contracts import Backbone, Crops, Source, UserError
from dino_lite.data.clean import CleanData
from dino_lite.data.photometric import Normalize
from dino_lite.eval.features import Features, device_of, dtype_of, frozen
from dino_lite.eval.heat import heat, overlay
from dino_lite.eval.neighbors import nearest

_INK, _GRAY, _LINE = "#1f2933", "#6b7785", "#cbd2d9"
_BLUE, _ORANGE = "#1769aa", "#d9762b"  # the color-blind tell them apart too
_MARGIN, _GAP, _GROUP_GAP = 36, 8, 30  # pixels
_TOP, _LINE_BELOW = 144, 26  # where the first row begins; what a line of text below a cell takes
_WIDTH = 192  # pixels of a picture in a sheet, about
_DPI = 150


class Cell(NamedTuple):
    """One picture of a sheet: pixels, drawn width, color of its frame, a line of text below."""

    pixels: UInt8[np.ndarray, "h w 3"]
    width: int
    frame: str | None = None
    below: str = ""

    @property
    def height(self) -> int:
        """Pixels it takes from top to bottom, text apart."""
        height, width = self.pixels.shape[:2]
        return round(self.width * int(height) / int(width))


class Heading(NamedTuple):
    """What stands above a group of cells: what they are, and a smaller line."""

    text: str
    detail: str


Row = list[list[Cell]]  # groups of cells, as many as there are headings


def crops_picture(
    crops: Crops, normalize: Normalize | None, path: str | Path, num_images: int = 6
) -> None:
    """What student and teacher see: a row an image, global crops then local ones, sizes to scale.

    `crops` are uint8, or floats that `normalize` (mean, std) has made.
    """
    crops = crops.part(0, num_images)
    large = _rgb(crops.globals_, normalize)
    side = large.shape[-2]
    width = _drawn(side)
    rows: list[Row] = [[[Cell(crop[i], width) for crop in large]] for i in range(crops.num_images)]
    headings = [Heading("Student and teacher", f"{len(large)} global crops of {side} px")]
    if crops.locals_ is not None:
        small = _rgb(crops.locals_, normalize)
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
    num_heads: int = 6,
) -> None:
    """Where the class token looks: image, mean over the last block's heads on it, single heads."""
    with frozen(backbone):
        attention = backbone.attention(images.to(device_of(backbone), dtype_of(backbone)))
    grid = [side // backbone.patch_size for side in images.shape[-2:]]
    to_patches = attention[:, :, 0, -math.prod(grid) :]  # n heads P: patches are the last tokens
    maps = to_patches.float().cpu().reshape(*to_patches.shape[:2], *grid)  # n heads h w
    pixels = _rgb(images[None], normalize)[0]
    width = _drawn(pixels.shape[-2])
    shown = min(num_heads, maps.shape[1])
    rows: list[Row] = [
        [
            [Cell(image, width)],
            [Cell(overlay(image, heads.mean(dim=0)), width)],
            [Cell(heat(head), (width - _GAP) // 2) for head in heads[:shown]],
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
    """Images beside those of train with the most similar features; frames tell the class.

    `bank` and `queries` are the features of data's train and test; without queries the bank asks
    itself. Queries are spread evenly over classes (over the set if there are none), not picked.
    """
    train = _Readable(data, data.splits.train)
    asked, images = bank, train
    if queries is not None and data.splits.test is not None:
        asked, images = queries, _Readable(data, data.splits.test)
    rows = _spread_over_classes(asked.labels, num_queries)
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
            other, width = int(bank.labels[neighbor]), _WIDTH * 5 // 8
            frame = None if min(label, other) < 0 else _BLUE if label == other else _ORANGE
            cells.append(Cell(train.pixels(neighbor, width), width, frame, f"{value:.2f}"))
        query = Cell(
            images.pixels(row, _WIDTH * 3 // 4), _WIDTH * 3 // 4, None, images.label(label)
        )
        sheet.append([[query], cells])
    known = bool((bank.labels >= 0).any())
    whence = "train" if asked is bank else "test"
    headings = [Heading("Query", whence), Heading("Nearest in train", "cosine similarity")]
    legend = [(_BLUE, "same class"), (_ORANGE, "another class")] if known else []
    draw_sheet(sheet, path, "Nearest neighbors in the features", headings, legend, stack=False)


class _Readable:
    """The images of a source that could be read: row i of its features is image i here."""

    def __init__(self, data: CleanData, source: Source) -> None:
        self.source = source
        self.rows = [i for i in range(len(source)) if source.name(i) not in data.bad]

    def pixels(self, row: int, width: int) -> UInt8[np.ndarray, "w w 3"]:
        """The image's central square."""
        pixels = self.source.read(self.rows[row], width * width * 4)
        image = Image.fromarray(_as_rgb(pixels))
        method = _method(min(image.size), width)
        return np.asarray(ImageOps.fit(image, (width, width), method))

    def label(self, label: int) -> str:
        """What the class is called, if anything."""
        return self.source.classes[label] if 0 <= label < len(self.source.classes) else ""


def _spread_over_classes(labels: Int[Tensor, "N"], count: int) -> Int[Tensor, "n"]:
    """Rows of at most `count` images, each the middle one of another class where there are any."""
    classes = sorted(set(labels.tolist()))
    if len(classes) < 2:
        return torch.linspace(0, len(labels) - 1, min(count, len(labels))).long()
    chosen = torch.linspace(0, len(classes) - 1, min(count, len(classes))).long().tolist()
    rows = [(labels == classes[place]).nonzero()[:, 0] for place in chosen]
    return torch.stack([of_class[len(of_class) // 2] for of_class in rows])


def _rgb(
    images: Shaped[Tensor, "S n C h w"], normalize: Normalize | None
) -> UInt8[np.ndarray, "S n h w 3"]:
    """Pixels as they are stored, or as they were before `normalize`."""
    images = images.detach().cpu()
    if images.is_floating_point():
        images = images.double()
        if normalize is not None:
            images = images * normalize.std[:, None, None] + normalize.mean[:, None, None]
        images = (images * 255).round().clamp(0, 255).to(torch.uint8)
    return _as_rgb(images.permute(0, 1, 3, 4, 2).numpy())


def _as_rgb(pixels: UInt8[np.ndarray, "*lead h w C"]) -> UInt8[np.ndarray, "*lead h w 3"]:
    """Three channels that can be shown: one is repeated, of more the first three are taken."""
    if pixels.shape[-1] in (1, 2):
        pixels = np.repeat(pixels[..., :1], 3, axis=-1)
    return np.ascontiguousarray(pixels[..., :3])


def _drawn(size: int) -> int:
    """The width to draw `size` pixels at: a whole multiple where they are few, to stay sharp."""
    return size * max(1, round(_WIDTH / size)) if size <= 256 else 224


def _method(size: int, width: int) -> Image.Resampling:
    return Image.Resampling.NEAREST if width >= 2 * size else Image.Resampling.LANCZOS


def draw_sheet(
    rows: Sequence[Row],
    path: str | Path,
    title: str,
    headings: Sequence[Heading],
    legend: Sequence[tuple[str, str]] = (),
    stack: bool = True,
) -> None:
    """Draw rows of groups below their headings as PNG; small cells are stacked where they fit."""
    tall = max(cell.height for row in rows for group in row for cell in group)
    starts, ends, lines, x = [], [], [], _MARGIN
    for heading, cells in zip(headings, rows[0], strict=True):
        step = cells[0].height + _GAP
        most = (tall + _GAP) // step if stack else 1
        lines.append(max(n for n in range(1, most + 1) if len(cells) % n == 0))
        across = len(cells) // lines[-1]
        text = max(_font(18, True).getlength(heading.text), _font(16).getlength(heading.detail))
        starts.append(x)
        ends.append(x + max(across * (cells[0].width + _GAP) - _GAP, math.ceil(text)))
        x = ends[-1] + _GROUP_GAP
    below = _LINE_BELOW if any(cell.below for row in rows for group in row for cell in group) else 0
    used = sum(math.ceil(_font(16).getlength(text)) + 44 for _, text in legend)
    width = max(ends[-1], _MARGIN + math.ceil(_font(26, True).getlength(title)) + 30 + used)
    size = (width + _MARGIN, _TOP + len(rows) * (tall + below + _GAP) - _GAP + _MARGIN)
    page = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(page)
    draw.text((_MARGIN, 26), title, _INK, _font(26, True))
    _draw_legend(draw, legend, width)
    for heading, left, right in zip(headings, starts, ends, strict=True):
        draw.text((left, 78), heading.text, _INK, _font(18, True))
        draw.text((left, 103), heading.detail, _GRAY, _font(16))
        draw.line((left, 131, right, 131), _LINE, 2)
    for i, row in enumerate(rows):
        top = _TOP + i * (tall + below + _GAP)
        for cells, left, num_lines in zip(row, starts, lines, strict=True):
            across = len(cells) // num_lines
            height = num_lines * (cells[0].height + _GAP) - _GAP
            for place, cell in enumerate(cells):
                down, right = divmod(place, across)
                y = top + (tall - height) // 2 + down * (cell.height + _GAP)
                _draw_cell(page, draw, cell, left + right * (cell.width + _GAP), y)
    write_whole(path, lambda part: page.save(part, format="PNG", dpi=(_DPI, _DPI)))


def _draw_legend(draw: ImageDraw.ImageDraw, legend: Sequence[tuple[str, str]], right: int) -> None:
    for color, text in reversed(legend):
        right -= math.ceil(_font(16).getlength(text))
        draw.text((right, 34), text, _GRAY, _font(16))
        draw.rounded_rectangle((right - 22, 37, right - 8, 51), 3, color)
        right -= 44


def _draw_cell(page: Image.Image, draw: ImageDraw.ImageDraw, cell: Cell, x: int, y: int) -> None:
    image = Image.fromarray(cell.pixels)
    page.paste(image.resize((cell.width, cell.height), _method(image.width, cell.width)), (x, y))
    if cell.frame:
        draw.rectangle((x - 1, y - 1, x + cell.width, y + cell.height), outline=cell.frame, width=5)
    if cell.below:
        middle = x + cell.width // 2
        draw.text((middle, y + cell.height + 3), cell.below, _GRAY, _font(15), anchor="ma")


@cache
def _font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which comes with matplotlib."""
    import matplotlib as mpl

    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(Path(mpl.get_data_path()) / "fonts" / "ttf" / name, size)


def write_whole(path: str | Path, write: Callable[[Path], Any]) -> None:
    """Let `write` fill a file beside `path`, then put it in its place at once."""
    path = Path(path).expanduser()
    part = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(part)
        os.replace(part, path)
    except OSError as error:
        raise UserError(f"Cannot write {path}: {error.strerror or error}.") from error
    finally:
        with suppress(OSError):
            part.unlink()
