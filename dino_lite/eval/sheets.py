"""Layout and style shared by all pictures, and atomic file writes."""

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
from jaxtyping import Shaped, UInt8
from PIL import Image, ImageColor, ImageDraw, ImageFont, ImageOps
from torch import Tensor

from dino_lite.contracts import Source, UserError
from dino_lite.data.photometric import Normalize

INK, GRAY, LINE = "#1f2933", "#6b7785", "#cbd2d9"
BLUE, ORANGE = "#1769aa", "#d9762b"  # distinguishable to color-blind readers
MARGIN, GAP, _GROUP_GAP = 36, 8, 30  # pixels
TOP, _LINE_BELOW = 144, 26  # top of the first row; height of a line of text below a cell
WIDTH = 192  # approximate pixels of a picture in a sheet
DPI = 150
_ENTRY, _FEW = 44, 2  # pixels around a legend's text; entries that always fit beside the title


class Cell(NamedTuple):
    """One picture of a sheet: pixels, drawn width, color of its frame, a line of text below."""

    pixels: UInt8[np.ndarray, "h w 3"]
    width: int
    frame: str | None = None
    below: str = ""

    @property
    def height(self) -> int:
        """Its height in pixels, without text."""
        height, width = self.pixels.shape[:2]
        return round(self.width * int(height) / int(width))


class Heading(NamedTuple):
    """Heading of a group of cells: a title and a smaller line."""

    text: str
    detail: str


Row = list[list[Cell]]  # groups of cells, one per heading
Legend = Sequence[tuple[str, str]]  # color and meaning


def rgb(
    images: Shaped[Tensor, "S n C h w"], normalize: Normalize | None
) -> UInt8[np.ndarray, "S n h w 3"]:
    """Pixels for display: uint8 as is, floats with `normalize` undone."""
    images = images.detach().cpu()
    if images.is_floating_point():
        images = images.double()
        if normalize is not None:
            images = images * normalize.std[:, None, None] + normalize.mean[:, None, None]
        images = (images * 255).round().clamp(0, 255).to(torch.uint8)
    return as_rgb(images.permute(0, 1, 3, 4, 2).numpy())


def as_rgb(pixels: UInt8[np.ndarray, "*lead h w C"]) -> UInt8[np.ndarray, "*lead h w 3"]:
    """Three channels for display: one is repeated, of more the first three are taken."""
    if pixels.shape[-1] in (1, 2):
        pixels = np.repeat(pixels[..., :1], 3, axis=-1)
    return np.ascontiguousarray(pixels[..., :3])


def thumbnail(source: Source, index: int, width: int) -> UInt8[np.ndarray, "w w 3"]:
    """The central square of image `index`."""
    image = Image.fromarray(as_rgb(source.read(index, width * width * 4)))
    resampling = method(min(image.size), width)
    return np.asarray(ImageOps.fit(image, (width, width), resampling))


def mixed(color: str, share: float, ground: str = "#ffffff") -> tuple[int, int, int]:
    """A color blended with a background, `share` of it, as RGB."""
    both = zip(ImageColor.getrgb(color)[:3], ImageColor.getrgb(ground)[:3], strict=True)
    red, green, blue = (round(share * a + (1 - share) * b) for a, b in both)
    return red, green, blue


def shortened(text: str, width: float, size: int, bold: bool = False) -> str:
    """`text`, truncated to `width` pixels."""
    if font(size, bold).getlength(text) <= width:
        return text
    while text and font(size, bold).getlength(f"{text}\u2026") > width:
        text = text[:-1]
    return f"{text.rstrip()}\u2026"


def drawn(size: int) -> int:
    """The width at which to draw `size` pixels: a whole multiple for small images, to be sharp."""
    return size * max(1, round(WIDTH / size)) if size <= 256 else 224


def method(size: int, width: int) -> Image.Resampling:
    return Image.Resampling.NEAREST if width >= 2 * size else Image.Resampling.LANCZOS


def draw_sheet(
    rows: Sequence[Row],
    path: str | Path,
    title: str,
    headings: Sequence[Heading],
    legend: Legend = (),
    stack: bool = True,
) -> None:
    """Draw rows of groups below their headings as PNG; small cells are stacked if they fit."""
    tall = max(cell.height for row in rows for group in row for cell in group)
    starts, ends, lines, x = [], [], [], MARGIN
    for heading, cells in zip(headings, rows[0], strict=True):
        step = cells[0].height + GAP
        most = (tall + GAP) // step if stack else 1
        lines.append(max(n for n in range(1, most + 1) if len(cells) % n == 0))
        across = len(cells) // lines[-1]
        text = max(font(18, True).getlength(heading.text), font(16).getlength(heading.detail))
        starts.append(x)
        ends.append(x + max(across * (cells[0].width + GAP) - GAP, math.ceil(text)))
        x = ends[-1] + _GROUP_GAP
    below = _LINE_BELOW if any(cell.below for row in rows for group in row for cell in group) else 0
    height = TOP + len(rows) * (tall + below + GAP) - GAP + MARGIN
    page, draw = start_page(ends[-1], height, title, legend)
    for heading, left, right in zip(headings, starts, ends, strict=True):
        draw.text((left, 78), heading.text, INK, font(18, True))
        draw.text((left, 103), heading.detail, GRAY, font(16))
        draw.line((left, 131, right, 131), LINE, 2)
    for i, row in enumerate(rows):
        top = TOP + i * (tall + below + GAP)
        for cells, left, num_lines in zip(row, starts, lines, strict=True):
            across = len(cells) // num_lines
            height = num_lines * (cells[0].height + GAP) - GAP
            for place, cell in enumerate(cells):
                down, right = divmod(place, across)
                y = top + (tall - height) // 2 + down * (cell.height + GAP)
                _draw_cell(page, draw, cell, left + right * (cell.width + GAP), y)
    save_page(page, path)


def start_page(
    right: int, bottom: int, title: str, legend: Legend = ()
) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    """A white page with its title. The drawing ends at `right` and, including the margin, at
    `bottom`; the legend is placed beside the title if it fits, else below, in lines.
    """
    entries = [math.ceil(font(16).getlength(text)) + _ENTRY for _, text in legend]
    titled = MARGIN + math.ceil(font(26, True).getlength(title))
    beside = titled + 30 + sum(entries)
    if len(legend) > _FEW and beside > right:
        right = max(right, titled, MARGIN + max(entries))
        places, x, y = [], MARGIN, bottom
        for entry in entries:
            if x + entry > right + _ENTRY:
                x, y = MARGIN, y + _LINE_BELOW
            places.append((x, y))
            x += entry
        bottom = y + _LINE_BELOW + MARGIN - GAP
    else:
        right = max(right, beside if legend else titled)
        places = [(right - sum(entries[i:]) + 22, 34) for i in range(len(entries))]
    page = Image.new("RGB", (right + MARGIN, bottom), "white")
    draw = ImageDraw.Draw(page)
    draw.text((MARGIN, 26), title, INK, font(26, True))
    for (x, y), (color, text) in zip(places, legend, strict=True):
        draw.rounded_rectangle((x, y + 3, x + 14, y + 17), 3, color)
        draw.text((x + 22, y), text, GRAY, font(16))
    return page, draw


def save_page(page: Image.Image, path: str | Path) -> None:
    """Write as PNG, atomically."""
    write_whole(path, lambda part: page.save(part, format="PNG", dpi=(DPI, DPI)))


def _draw_cell(page: Image.Image, draw: ImageDraw.ImageDraw, cell: Cell, x: int, y: int) -> None:
    image = Image.fromarray(cell.pixels)
    page.paste(image.resize((cell.width, cell.height), method(image.width, cell.width)), (x, y))
    if cell.frame:
        draw.rectangle((x - 1, y - 1, x + cell.width, y + cell.height), outline=cell.frame, width=5)
    if cell.below:
        middle = x + cell.width // 2
        draw.text((middle, y + cell.height + 3), cell.below, GRAY, font(15), anchor="ma")


@cache
def font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which ships with matplotlib."""
    import matplotlib as mpl

    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(Path(mpl.get_data_path()) / "fonts" / "ttf" / name, size)


def write_whole(path: str | Path, write: Callable[[Path], Any]) -> None:
    """Write atomically: `write` fills a file beside `path`, which then replaces it."""
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
