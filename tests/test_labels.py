"""Classes come from folders, a CSV file or nowhere, as asked, and mean the same in both splits."""

from __future__ import annotations

from pathlib import Path

import pytest

from dino_lite.data.folder import open_folder
from images import classes, fill, sentence


def test_class_is_the_first_folder_and_indices_agree(tmp_path: Path) -> None:
    """Train's classes sorted, then test's own; test may lack some."""
    fill(
        tmp_path,
        *("train/dog/1.png", "train/dog/deep/2.png", "train/cat/1.png", "train/cat/2.png"),
        *("val/ape/1.png", "val/dog/1.png"),
    )
    splits = open_folder(tmp_path)
    assert splits.test is not None
    assert splits.train.classes == splits.test.classes == ["cat", "dog", "ape"]
    assert classes(splits.train) == ["cat", "cat", "dog", "dog"]
    assert classes(splits.test) == ["ape", "dog"]


@pytest.mark.parametrize(
    "files",
    [
        ["a/1.png", "a/2.png", "b/1.png", "b/2.png", "stray.png"],
        ["a/1.png", "a/2.png", "b/1.png"],
        ["a/1.png", "a/2.png"],
        ["1.png", "2.png"],
    ],
    ids=["one image in no folder", "a class of one image", "one class", "no folder"],
)
def test_folders_that_are_no_classes(tmp_path: Path, files: list[str]) -> None:
    """Without being asked, labels are taken only where they make sense."""
    source = open_folder(fill(tmp_path, *files)).train
    assert source.labels is None
    assert source.classes == []
    assert open_folder(tmp_path, labels="none").train.labels is None


@pytest.mark.parametrize(
    ("files", "how", "words"),
    [
        (["a/{}", "b/{}"], "auto", "the folders a, b"),
        (["a/{}", "b/{}"], "none", "data.labels=none"),
        (
            ["a/{}", "b/{}", "stray.png"],
            "auto",
            "1 image is in no class folder (stray.png): ",
        ),
        (["a/{}", "b/{}", "{}"], "auto", "2 images are in no class folder (the first being 1.png)"),
        (["a/{}"], "auto", "all images are in one folder"),
        (["{}"], "auto", "all images are in one folder"),
        (["a/{}", "b/1.png"], "auto", "class b has one image: data.labels=folder"),
        (["a/{}", "b/1.png", "c/1.png"], "auto", "2 classes have one image (b, c)"),
        (["train/a/{}", "train/b/{}", "val/{}"], "auto", "test has no labels, as 2 images have no"),
        (
            ["train/a/{}", "train/b/{}", "val/c/{}"],
            "auto",
            "test has no labels, as its classes",
        ),
    ],
)
def test_where_labels_come_from_or_why_there_are_none(
    tmp_path: Path, files: list[str], how: str, words: str
) -> None:
    """The true reason, with the key that changes it."""
    names = [file.format(f"{i}.png") for file in files for i in (1, 2)]
    splits = open_folder(fill(tmp_path, *names), labels=how)
    assert words in splits.labels_from
    assert (splits.train.labels is None) == ("the folders" not in words and "test" not in words)


def test_test_classes_that_share_none_of_trains_are_no_labels(tmp_path: Path) -> None:
    """An accuracy of 0 would say nothing of the features."""
    fill(tmp_path, *(f"{s}/{c}/{i}.png" for s, c in (("train", "a"), ("train", "b")) for i in "12"))
    fill(tmp_path, "test/c/1.png", "test/d/1.png")
    splits = open_folder(tmp_path)
    assert splits.test is not None
    assert splits.test.labels is None
    assert splits.train.classes == ["a", "b"]


def test_test_split_without_folders_has_no_labels(tmp_path: Path) -> None:
    """Train keeps its own."""
    fill(tmp_path, *(f"train/{c}/{i}.png" for c in "ab" for i in "12"), "test/1.png")
    splits = open_folder(tmp_path)
    assert classes(splits.train) == ["a", "a", "b", "b"]
    assert splits.test is not None
    assert splits.test.labels is None


def test_labels_none(tmp_path: Path) -> None:
    """Folders need not be classes."""
    fill(tmp_path, *(f"{c}/{i}.png" for c in "ab" for i in "12"))
    assert open_folder(tmp_path, labels="none").train.labels is None
    assert open_folder(tmp_path, labels=None).train.labels is None


def test_labels_folder_takes_a_class_of_one_image(tmp_path: Path) -> None:
    """Who asks for them gets them."""
    fill(tmp_path, "a/1.png", "a/2.png", "b/1.png")
    assert classes(open_folder(tmp_path, labels="folder").train) == ["a", "a", "b"]


@pytest.mark.parametrize(
    ("files", "told"),
    [
        (["a/1.png", "b/1.png", "stray.png"], "stray.png"),
        (["a/1.png", "a/2.png"], "the class a alone"),
        (["1.png", "2.png"], "no class"),
        ([*(f"train/{c}/1.png" for c in "ab"), "val/a/1.png", "val/2.png"], "val/2.png"),
    ],
)
def test_labels_folder_on_data_that_has_none(tmp_path: Path, files: list[str], told: str) -> None:
    """The sentence names what is in the way."""
    assert told in sentence(open_folder, fill(tmp_path, *files), labels="folder")


def test_labels_from_a_csv(tmp_path: Path) -> None:
    """Paths relative to root, a heading or none, quoted commas, more columns, rows of no image."""
    fill(tmp_path, "train/a.png", "train/x, y.png", "val/c.png")
    rows = 'path,label,who\n./train/a.png, two ,me\n"train/x, y.png",one\n'
    rows += "\nval/c.png,two\ngone.png,z\n"
    (tmp_path / "labels.csv").write_text(rows, encoding="utf-8-sig")
    splits = open_folder(tmp_path, labels="labels.csv")
    assert classes(splits.train) == ["two", "one"]
    assert classes(splits.test) == ["two"]
    assert splits.train.classes == ["one", "two"]
    (tmp_path / "bare.csv").write_text(rows.split("\n", 1)[1], encoding="utf-8")
    assert classes(open_folder(tmp_path, labels=str(tmp_path / "bare.csv")).train) == ["two", "one"]


def test_a_csv_may_leave_out_the_test_split(tmp_path: Path) -> None:
    """All of it or nothing."""
    fill(tmp_path, "train/a.png", "train/b.png", "val/c.png", "val/d.png")
    table = tmp_path / "labels.csv"
    table.write_text("train/a.png,1\ntrain/b.png,2\n")
    splits = open_folder(tmp_path, labels="labels.csv")
    assert classes(splits.train) == ["1", "2"]
    assert splits.test is not None
    assert splits.test.labels is None
    table.write_text("train/a.png,1\ntrain/b.png,2\nval/c.png,1\n")
    assert "val/d.png" in sentence(open_folder, tmp_path, labels="labels.csv")


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ("a.png,1\n", "b.png"),
        ("a.png,1\nb.png,1\n", "the class 1 alone"),
        ("a.png;1\nb.png;2\n", "Row 1"),
        ("a.png,1\nb.png,\n", "Row 2"),
        ("", "no class"),
    ],
)
def test_csv_that_does_not_fit(tmp_path: Path, rows: str, told: str) -> None:
    """The first image without a label, or the first row that is none, is named."""
    fill(tmp_path, "a.png", "b.png")
    (tmp_path / "labels.csv").write_text(rows)
    assert told in sentence(open_folder, tmp_path, labels="labels.csv")


def test_labels_that_are_nothing_known(tmp_path: Path) -> None:
    """A misspelled word or a CSV that is not there."""
    fill(tmp_path, "a.png")
    assert "data.labels=folders" in sentence(open_folder, tmp_path, labels="folders")
    assert "data.labels=gone.csv" in sentence(open_folder, tmp_path, labels="gone.csv")
