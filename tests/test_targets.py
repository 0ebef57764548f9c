"""Tables of numbers find their images by path, or say which row does not."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from dino_lite.contracts import Splits
from dino_lite.data.folder import open_folder
from dino_lite.data.targets import read_targets
from images import fill, sentence


def split(tmp_path: Path) -> Splits:
    return open_folder(
        fill(tmp_path / "set", "train/a/1.png", "train/b/1.png", "val/a/2.png", "val/b/3.png")
    )


def write(tmp_path: Path, text: str) -> str:
    (tmp_path / "t.csv").write_text(text)
    return str(tmp_path / "t.csv")


def test_rows_find_their_images_in_any_split_and_any_order(tmp_path: Path) -> None:
    """By the path below the root, or an end of it that tells the image from others."""
    splits = split(tmp_path)
    name = write(tmp_path, "x, path ,y\n3,3.png,0\n\n1,train/a/1.png,1e-2\n2,b/1.png,-5\n")
    found = read_targets(name, "key", [splits.train, splits.test])
    assert found.titles == ["x", "y"]
    assert found.values.tolist() == [[3, 0], [1, 0.01], [2, -5]]
    assert [rows.tolist() for rows in found.rows] == [[1, 2], [-1, 0]]
    assert np.array(found.rows[0]).dtype == np.int64


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("path,x\nc/9.png,1\n", "the row of c/9.png matches no image"),
        ("path,x\n1.png,1\n", "the row of 1.png matches 2 images"),
        ("path,x\na/1.png,1\n./a/1.png,2\n", "two rows of a/1.png"),
        ("path,x\na/1.png,big\n", "Row 2 of .* is not a path and 1 number:"),
        ("path,x\na/1.png,nan\n", "Row 2"),
        ("path,x,y\na/1.png,1\n", "Row 2"),
        ("path,x\n,1\n", "Row 2"),
        ("path,x\n", "heading only"),
        ("path\na/1.png\n", "needs a heading"),
        ("a/1.png,1\n", "needs a heading"),
        ("", "needs a heading"),
    ],
)
def test_what_is_wrong_with_a_table_is_a_sentence(tmp_path: Path, text: str, words: str) -> None:
    """With the key, the file and the row."""
    told = sentence(read_targets, write(tmp_path, text), "eval.x.targets", [split(tmp_path).train])
    assert "t.csv" in told
    assert re.search(words, told), told


def test_a_file_that_is_not_there_is_a_sentence(tmp_path: Path) -> None:
    """The system's reason is told."""
    told = sentence(read_targets, str(tmp_path / "no.csv"), "key", [split(tmp_path).train])
    assert "No such file" in told
