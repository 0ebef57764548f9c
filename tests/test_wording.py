"""Counts in sentences."""

from __future__ import annotations

import pytest

from dino_lite.wording import count


@pytest.mark.parametrize(
    ("num", "noun", "text"),
    [
        (1, "image", "1 image"),
        (0, "image", "0 images"),
        (12_345, "test image", "12,345 test images"),
        (1, "class", "1 class"),
        (2, "class", "2 classes"),
        (2, "batch", "2 batches"),
    ],
)
def test_a_count_agrees_with_its_noun(num: int, noun: str, text: str) -> None:
    """In the singular too."""
    assert count(num, noun) == text
