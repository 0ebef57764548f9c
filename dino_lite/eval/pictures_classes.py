"""Confusion matrix and the most confused pairs of classes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Int
from PIL import Image, ImageDraw
from torch import Tensor

from dino_lite.contracts import UserError
from dino_lite.eval.sheets import (
    BLUE,
    GRAY,
    INK,
    LINE,
    MARGIN,
    font,
    mixed,
    save_page,
    shortened,
    start_page,
)

_MOST = 100  # classes in a matrix
_SIDE, _NAME = 1000, 190  # approximate pixels of the matrix, and of a class's name
_TITLE = "What is taken for what"
_WRONG = "#c4541a"  # a darker orange, so that small shares are visible on white


class Confused(NamedTuple):
    """A true class, the class predicted instead, how often, and the number of its images."""

    truth: int
    taken_for: int
    times: int
    num: int


def most_confused(counts: Int[Tensor, "C C"], num_pairs: int) -> list[Confused]:
    """The most confused pairs of different classes, by share of the true class."""
    each = counts.sum(dim=1).tolist()
    pairs = [
        Confused(row, column, int(counts[row, column]), each[row])
        for row, column in counts.nonzero().tolist()
        if row != column
    ]
    return sorted(pairs, key=lambda pair: (-pair.times / pair.num, pair.truth))[:num_pairs]


def confusion_picture(
    counts: Int[Tensor, "C C"],
    classes: Sequence[str],
    path: str | Path,
    protocol: str = "",
    num_pairs: int = 14,
) -> None:
    """A row per true class, a column per prediction, in percent of the row; beside it the most
    confused pairs. `counts` as from `segmentation.confusion`.

    Of more than 100 classes those with the lowest recall are drawn.
    """
    if len(counts) < 2 or int(counts.sum()) == 0:
        raise UserError("a confusion matrix needs at least 2 classes, and images of them.")
    each = counts.sum(dim=1)
    right = 100 * float(counts.diagonal().sum() / each.sum())
    shown, whose = torch.arange(len(counts)), ""
    if len(counts) > _MOST:
        recall = (counts.diagonal() / each).nan_to_num(2.0)  # classes without an image come last
        shown = recall.argsort(stable=True)[:_MOST].sort().values
        whose = f"; the {_MOST} of {len(counts)} classes that are recognized least"
    names = [classes[i] for i in shown.tolist()]
    cell = max(13, min(56, _SIDE // len(shown)))
    size = max(9, min(16, cell - 3))
    label = min(_NAME, 10 + max(int(font(size).getlength(name)) for name in names))
    pairs = most_confused(counts, num_pairs)
    left, top = MARGIN + label + 6, 120 + label
    side = cell * len(shown)
    listed = left + side + 44
    bottom = max(top + side, 128 + 34 * len(pairs)) + MARGIN
    legend = [(BLUE, "recognized"), (_WRONG, "taken for another")]
    page, draw = start_page(listed + _listed_width(pairs, classes), bottom, _TITLE, legend)
    about = f"{protocol}: " if protocol else ""
    draw.text(
        (MARGIN, 66),
        f"{about}{right:.1f} % of {int(each.sum()):,} images are recognized{whose}",
        GRAY,
        font(16),
    )
    _draw_matrix(draw, counts[shown][:, shown], each[shown], (left, top), cell)
    for i, name in enumerate(names):
        middle = i * cell + cell // 2
        text = shortened(name, label - 8, size)
        draw.text((left - 8, top + middle), text, INK, font(size), anchor="rm")
        _draw_upright(page, text, (left + middle, top - 8), size)
    _draw_pairs(draw, pairs, classes, listed)
    save_page(page, path)


def _draw_matrix(
    draw: ImageDraw.ImageDraw,
    counts: Int[Tensor, "C C"],
    each: Int[Tensor, "C"],
    corner: tuple[int, int],
    cell: int,
) -> None:
    """Squares, darker for larger shares; small shares are emphasized."""
    left, top = corner
    gap = 1 if cell < 24 else 2
    for row in range(len(counts)):
        for column in range(len(counts)):
            x, y = left + column * cell, top + row * cell
            box = (x, y, x + cell - gap - 1, y + cell - gap - 1)
            count, num = int(counts[row, column]), int(each[row])
            share = count / num if num else 0.0
            depth = share if row == column else min(1.0, 1.4 * share**0.5)
            color = BLUE if row == column else _WRONG
            draw.rectangle(box, mixed(color, 0.1 + 0.9 * depth) if count else mixed(LINE, 0.25))
            if count and cell >= 28:
                ink = "white" if depth > 0.45 else INK
                middle = (x + (cell - gap) / 2, y + (cell - gap) / 2)
                draw.text(middle, f"{100 * share:.0f}", ink, font(min(15, cell // 2)), anchor="mm")


def _draw_upright(page: Image.Image, text: str, foot: tuple[int, int], size: int) -> None:
    """Text rotated to read upwards from its foot."""
    drawn = font(size)
    width, height = int(drawn.getlength(text)) + 2, size + 6
    strip = Image.new("RGB", (width, height), "white")
    ImageDraw.Draw(strip).text((0, height // 2), text, INK, drawn, anchor="lm")
    page.paste(strip.rotate(90, expand=True), (foot[0] - height // 2, foot[1] - width))


def _listed_width(pairs: Sequence[Confused], classes: Sequence[str]) -> int:
    texts = [_texts(pair, classes) for pair in pairs]
    widths = [font(16).getlength(names) + font(16).getlength(count) for names, count in texts]
    return max(300, int(max(widths, default=0)) + 40)


def _texts(pair: Confused, classes: Sequence[str]) -> tuple[str, str]:
    truth, other = (shortened(classes[i], _NAME, 16) for i in (pair.truth, pair.taken_for))
    return f"{truth} \u2192 {other}", f"{pair.times} of {pair.num}"


def _draw_pairs(
    draw: ImageDraw.ImageDraw, pairs: Sequence[Confused], classes: Sequence[str], left: int
) -> None:
    """The list of pairs, each with a bar for its share."""
    right = left + _listed_width(pairs, classes)
    draw.text((left, 78 + 24), "Most confused", INK, font(18, True))
    if not pairs:
        draw.text((left, 138), "none", GRAY, font(16))
    for i, pair in enumerate(pairs):
        names, count = _texts(pair, classes)
        y = 138 + 34 * i
        draw.text((left, y), names, INK, font(16))
        draw.text((right, y), count, GRAY, font(16), anchor="ra")
        draw.line((left, y + 24, right, y + 24), LINE, 2)
        draw.line((left, y + 24, left + (right - left) * pair.times / pair.num, y + 24), _WRONG, 3)
