"""Counts in sentences."""

from __future__ import annotations


def count(num: int, noun: str) -> str:
    """ "1 image", "1,234 images", "2 classes"."""
    plural = "" if num == 1 else "es" if noun.endswith(("s", "x", "ch")) else "s"
    return f"{num:,} {noun}{plural}"
