"""Counts in sentences, and tables of text."""

from __future__ import annotations

from collections.abc import Sequence


def count(num: int, noun: str) -> str:
    """ "1 image", "1,234 images", "2 classes"."""
    plural = "" if num == 1 else "es" if noun.endswith(("s", "x", "ch")) else "s"
    return f"{num:,} {noun}{plural}"


def aligned(rows: Sequence[Sequence[str]], columns: str = "") -> list[str]:
    """Lines in which the cells of each column have one width: `columns` has "<" or ">" for each of
    the first columns, and its last sign stands for the others; "": all to the left.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    signs = (columns or "<").ljust(len(widths), (columns or "<")[-1])
    return [
        "  ".join(
            f"{cell:{sign}{width}}" for cell, sign, width in zip(row, signs, widths, strict=True)
        ).rstrip()
        for row in rows
    ]
