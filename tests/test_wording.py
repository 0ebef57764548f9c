"""Counts in sentences, and tables of text."""

from __future__ import annotations

import pytest

from dino_lite.wording import aligned, count


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


def test_columns_of_a_table_have_one_width_and_lines_no_spaces_at_the_end() -> None:
    """The last sign stands for all further columns."""
    rows = [["", "a", "bb"], ["long", "1", ""]]
    assert aligned(rows) == ["      a  bb", "long  1"]
    assert aligned(rows, ">") == ["      a  bb", "long  1"]
    rows = [["", "wide", "n"], ["x", "1", "22"]]
    assert aligned(rows) == ["   wide  n", "x  1     22"]
    assert aligned(rows, "<>") == ["   wide   n", "x     1  22"]
