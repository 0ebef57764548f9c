"""A folder gives its image files in one order everywhere, and its splits."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dino_lite.data import walk as walk_module
from dino_lite.data.auto import open_auto
from dino_lite.data.facts import read_facts
from dino_lite.data.folder import open_folder
from dino_lite.data.roots import absolute
from dino_lite.runs.identity import absolute_paths
from images import GREEN, classes, fill, names, sentence


def test_any_nesting_in_byte_order(tmp_path: Path) -> None:
    """Order is that of the paths' bytes: capitals first, é last, whatever the file system lists."""
    fill(tmp_path, "b.png", "a/z/y/x.JPG", "B.webp", "a-b/c.PNG", "é.bmp", "a/10.gif", "a/2.tiff")
    source = open_folder(tmp_path).train
    found = [source.name(i).removeprefix(f"{tmp_path}/") for i in range(len(source))]
    assert found == ["B.webp", "a-b/c.PNG", "a/10.gif", "a/2.tiff", "a/z/y/x.JPG", "b.png", "é.bmp"]


def test_what_is_hidden_or_no_image_is_left_out(tmp_path: Path) -> None:
    """Dot files, dot folders, other suffixes, folders that look like images, links to nothing."""
    fill(tmp_path, "a.png", ".b.png", ".cache/c.png", "d/._e.jpg", "f.png/g.png")
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "png").write_text("x")
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere")
    assert names(open_folder(tmp_path).train) == ["a.png", "g.png"]


def test_links_are_followed_but_into_no_circle(tmp_path: Path) -> None:
    """A linked folder counts, one that leads back up does not."""
    fill(tmp_path / "store", "a.png")
    fill(tmp_path / "data", "b.png")
    (tmp_path / "data" / "linked").symlink_to(tmp_path / "store")
    (tmp_path / "data" / "linked" / "up").symlink_to(tmp_path / "data")
    assert names(open_folder(tmp_path / "data").train) == ["b.png", "a.png"]


@pytest.mark.parametrize("name", ["a b", "é", "a=b", "pics (1)", "[x],{y}", "x#y", "-n", "'"])
def test_odd_paths(tmp_path: Path, name: str) -> None:
    """Folders and files may be called what they like."""
    root = fill(tmp_path / name, f"{name}/{name}.png", f"{name}/2.png", f"c/{name}.png", "c/2.png")
    splits = open_auto(str(root))
    assert splits.name == name
    assert f"{name}.png" in names(splits.train)
    assert set(classes(splits.train) or []) == {name, "c"}
    assert tuple(splits.train.read(0)[0, 0]) == GREEN


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    """Such a file is read, and has a name that can be printed."""
    source_file = fill(tmp_path, "a.png") / "a.png"
    try:
        os.rename(source_file, os.path.join(os.fsencode(tmp_path), b"\xff.png"))
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    source = open_folder(tmp_path).train
    assert source.read(0).shape == (4, 6, 3)
    assert source.name(0).encode().endswith(b"\\xff.png")


def test_tilde_and_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`~` and `$NAME` in root are expanded."""
    fill(tmp_path / "photos", "a.png")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PHOTOS", "photos")
    assert names(open_auto("~/photos").train) == ["a.png"]
    assert names(open_folder(f"{tmp_path}/${{PHOTOS}}").train) == ["a.png"]


def test_name_is_the_folders_also_for_a_dot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Runs are named after the data: a dot is no name."""
    monkeypatch.chdir(fill(tmp_path / "photos", "a.png"))
    assert open_folder(".").name == "photos"


def test_digest_is_of_the_list_not_of_its_place(tmp_path: Path) -> None:
    """A file more, less or renamed changes it, another folder does not; names are kept apart."""
    digests = [
        open_folder(fill(tmp_path / str(i), *files)).train.digest()
        for i, files in enumerate(
            [("a.png", "b.png"), ("a.png", "c.png"), ("a.png",), ("a.pngb.png",)]
        )
    ]
    assert len(set(digests)) == 4
    assert all(len(d) == 16 and int(d, 16) >= 0 for d in digests)
    assert open_folder(fill(tmp_path / "moved", "a.png", "b.png")).train.digest() == digests[0]


def test_a_source_survives_pickling_and_is_small(tmp_path: Path) -> None:
    """What spawned workers get: the same source, with no object for each file."""
    fill(tmp_path, *(f"{i:03}.png" for i in range(100)))
    source = open_folder(tmp_path).train
    sent = pickle.dumps(source)
    assert len(sent) < 100 * (len("000.png") + 8) + 1000
    copy = pickle.loads(sent)
    assert copy.digest() == source.digest()
    assert np.array_equal(copy.read(99), source.read(99))


@pytest.mark.parametrize("other", ["val", "test"])
def test_train_beside_val_or_test(tmp_path: Path, other: str) -> None:
    """Pretraining sees train alone; images outside of both are in neither."""
    fill(tmp_path, "train/a.png", f"{other}/b.png", "extra/c.png")
    splits = open_folder(tmp_path)
    assert (names(splits.train), names(splits.test)) == (["a.png"], ["b.png"])


def test_val_is_the_test_split_where_both_are(tmp_path: Path) -> None:
    """As in ImageNet, whose test has no labels."""
    fill(tmp_path, "train/a.png", "val/b.png", "test/c.png")
    assert names(open_folder(tmp_path).test) == ["b.png"]


def test_train_alone_is_a_split(tmp_path: Path) -> None:
    """Its folders are the classes then."""
    fill(tmp_path, "train/x/1.png", "train/x/2.png", "train/y/1.png", "train/y/2.png")
    splits = open_folder(tmp_path)
    assert classes(splits.train) == ["x", "x", "y", "y"]
    assert splits.test is None


def test_a_class_called_train_is_no_split(tmp_path: Path) -> None:
    """Beside other folders, without val or test, it is one of the classes."""
    fill(tmp_path, "train/1.png", "train/2.png", "car/1.png", "car/2.png")
    splits = open_folder(tmp_path)
    assert classes(splits.train) == ["car", "car", "train", "train"]
    assert splits.test is None


def test_without_train_nothing_is_test(tmp_path: Path) -> None:
    """A folder called test has no meaning of its own."""
    fill(tmp_path, "test/1.png", "b.png")
    splits = open_folder(tmp_path)
    assert len(splits.train) == 2
    assert splits.test is None


def test_empty_train_is_refused(tmp_path: Path) -> None:
    """Training on the test images instead would be no favor."""
    fill(tmp_path, "val/a.png")
    (tmp_path / "train").mkdir()
    assert "train holds no image" in sentence(open_folder, tmp_path)


def test_no_such_folder(tmp_path: Path) -> None:
    """What is not there, not a folder, not set, or empty is named."""
    (tmp_path / "file.png").write_text("x")
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "readme.txt").write_text("x")
    assert "does not exist" in sentence(open_folder, tmp_path / "nowhere")
    assert "is not a folder" in sentence(open_folder, tmp_path / "file.png")
    assert "data.root is not set" in sentence(open_folder)
    assert "data.root is not set" in sentence(open_folder, "")
    assert "holds no image file" in sentence(open_folder, tmp_path / "empty")
    assert "holds no image file" in sentence(open_folder, tmp_path / "text")


def test_a_folder_that_may_not_be_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is left out with a sentence; nothing is known of its images. The root must be listed."""
    fill(tmp_path, "a.png", "locked/b.png")
    scandir = os.scandir

    def locked(path: bytes) -> Any:
        if path.endswith(b"locked"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(walk_module.os, "scandir", locked)
    splits = open_folder(tmp_path)
    assert names(splits.train) == ["a.png"]
    assert "locked cannot be listed (Permission denied)" in splits.left_out[0]
    assert "data.exclude=locked" in splits.left_out[0]
    assert open_folder(tmp_path, exclude="locked").left_out == ()
    assert "cannot be listed" in sentence(open_folder, tmp_path / "locked")


# -------------------------------------------------------------------- several roots and patterns


def test_several_roots(tmp_path: Path) -> None:
    """Each has its own splits; a class is the same in all; the first gives the name."""
    fill(tmp_path / "one", "train/cat/1.png", "train/dog/2.png", "val/cat/3.png")
    fill(tmp_path / "two", "cat/4.png", "cow/5.png")
    fill(tmp_path / "three", "train/cow/6.png", "train/dog/7.png", "test/cow/8.png")
    roots = [tmp_path / name for name in ("one", "two", "three")]
    splits = open_folder(roots)
    assert names(splits.train) == ["1.png", "2.png", "4.png", "5.png", "6.png", "7.png"]
    assert classes(splits.train) == ["cat", "dog", "cat", "cow", "cow", "dog"]
    assert names(splits.test) == ["3.png", "8.png"]
    assert classes(splits.test) == ["cat", "cow"]
    assert splits.name == "one+2"
    assert splits.train.name(2) == str(tmp_path / "two" / "cat" / "4.png")
    assert all(splits.train.read(i).shape == (4, 6, 3) for i in range(6))


def test_several_roots_as_they_are_typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`[a,b]` with spaces, quotes, ~, variables and patterns; but a folder of that name is one."""
    fill(tmp_path, "a/1.png", "b c/2.png", "d1/3.png", "d2/4.png")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WHERE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert names(open_auto("[~/a, '$WHERE/b c',d?]").train) == [f"{i}.png" for i in (1, 2, 3, 4)]
    fill(tmp_path, "[a,b]/5.png")
    assert names(open_auto("[a,b]").train) == ["5.png"]


def test_the_digest_of_several_roots(tmp_path: Path) -> None:
    """It follows order and folders, but all of them may move together."""
    for place in ("here", "there"):
        fill(tmp_path / place, "a/1.png", "b/1.png", "b/2.png", "c/2.png")

    def digest(*roots: str) -> str:
        return open_folder([tmp_path / root for root in roots]).train.digest()

    assert digest("here/a", "here/b") == digest("there/a", "there/b")
    different = [("here/a", "here/b"), ("here/b", "here/a"), ("here/b", "here/c"), ("here/b",)]
    assert len({digest(*roots) for roots in different}) == 4


@pytest.mark.parametrize(
    ("pattern", "found", "named"),
    [
        ("site*", ["1.png", "2.png", "3.jpg"], "site1+1"),
        ("site?/cat", ["1.png", "3.jpg"], "cat+1"),
        ("*/cat/*.png", ["1.png"], None),
        ("**/*.png", ["0.png", "1.png", "2.png"], None),
        ("**", ["0.png", "1.png", "2.png", "3.jpg"], None),
        ("site[12]/dog/2.*", ["2.png"], None),
    ],
)
def test_patterns(tmp_path: Path, pattern: str, found: list[str], named: str | None) -> None:
    """Folders or image files, sorted, each image once; files belong to where the pattern begins."""
    fill(tmp_path, "0.png", "site1/cat/1.png", "site1/dog/2.png", "site2/cat/3.jpg")
    (tmp_path / "site1" / "notes.txt").write_text("x")
    splits = open_auto(f"{tmp_path}/{pattern}")
    assert names(splits.train) == found
    assert splits.name == (named or tmp_path.name)


def test_splits_and_classes_of_a_pattern_of_files(tmp_path: Path) -> None:
    """Below the folder it begins with, they are what they would be without the pattern."""
    fill(tmp_path, *(f"{s}/{c}/{i}.png" for s in ("train", "val") for c in "ab" for i in (1, 2)))
    splits = open_folder(f"{tmp_path}/**/1.png")
    assert splits.test is not None
    assert [splits.train.name(i) for i in range(2)] == [f"{tmp_path}/train/{c}/1.png" for c in "ab"]
    labeled = open_folder(f"{tmp_path}/**/1.png", labels="folder")
    assert classes(labeled.train) == classes(labeled.test) == ["a", "b"]


def test_a_root_within_another_counts_once(tmp_path: Path) -> None:
    """So does a root that is named twice."""
    fill(tmp_path, "a/1.png", "a/b/2.png")
    roots = ["a", "a/b", "a", "a/*.png", "a/b/2.*"]
    assert names(open_folder([tmp_path / root for root in roots]).train) == ["1.png", "2.png"]


def test_several_roots_of_which_one_is_wrong(tmp_path: Path) -> None:
    """A part of the data is not left out without a word."""
    fill(tmp_path, "a/1.png")
    (tmp_path / "empty").mkdir()
    assert "nowhere does not exist" in sentence(open_auto, f"[{tmp_path}/a,{tmp_path}/nowhere]")
    assert "empty holds no image" in sentence(open_auto, [tmp_path / "a", tmp_path / "empty"])
    assert "x* matches nothing" in sentence(open_auto, f"{tmp_path}/x*")
    assert "data.root is not set" in sentence(open_auto, f"[{tmp_path}/a,]")
    assert "data.root=[] names nothing" in sentence(open_auto, [])


def test_a_csv_serves_several_roots(tmp_path: Path) -> None:
    """Each root has its own, or all have one, with paths relative to the root."""
    for root, label in (("a", "x"), ("b", "y")):
        fill(tmp_path / root, "1.png", "2.png")
        (tmp_path / root / "labels.csv").write_text(f"1.png,{label}\n2.png,z\n")
    roots = [tmp_path / "a", tmp_path / "b"]
    assert classes(open_folder(roots, labels="labels.csv").train) == ["x", "z", "y", "z"]
    shared = str(tmp_path / "a" / "labels.csv")
    assert classes(open_folder(roots, labels=shared).train) == ["x", "z", "x", "z"]
    (tmp_path / "b" / "labels.csv").write_text("1.png,y\n")
    assert "2.png" in sentence(open_folder, roots, labels="labels.csv")


def test_roots_that_mean_the_same_everywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a run's configuration keeps: absolute paths and patterns; names of other kinds as is."""
    fill(tmp_path, "a/1.png", "b/2.png")
    (tmp_path / "link").symlink_to(tmp_path / "a")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    assert absolute("a") == absolute("~/a") == absolute("link") == a
    assert absolute("[a, b]") == absolute(["a", "b"]) == [a, b]
    assert absolute("[a,*.d]") == [a, f"{tmp_path}/*.d"]
    assert absolute("*/x?.png") == f"{tmp_path}/*/x?.png"
    assert absolute("s3://bucket/*/list.csv") == "s3://bucket/*/list.csv"
    assert absolute("somebody/a-set") == "somebody/a-set"
    assert absolute(None) is None
    config = {"data": {"root": "[a,b]", "base": "a", "labels": "auto"}}
    assert absolute_paths(config)["data"] == {"root": [a, b], "base": a, "labels": "auto"}
    monkeypatch.chdir("/")
    assert names(open_folder([a, b]).train) == ["1.png", "2.png"]


def test_a_link_to_itself_is_no_image(tmp_path: Path) -> None:
    """It can be neither listed nor read."""
    fill(tmp_path, "a.png")
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    assert names(open_folder(tmp_path).train) == ["a.png"]


def test_order_is_that_of_whole_paths(tmp_path: Path) -> None:
    """Files and folders take turns as their paths' bytes say, at every depth."""
    fill(tmp_path, "b/c.png", "b.png", "b-/d.png", "b/c/e.png", "b/c-.png", "b0.png")
    source = open_folder(tmp_path).train
    found = [source.name(i).removeprefix(f"{tmp_path}/") for i in range(len(source))]
    assert found == sorted(found)
    assert len(found) == 6


# ------------------------------------------------------------------------- what is left out or in


def test_patterns_take_in_and_leave_out(tmp_path: Path) -> None:
    """Folders and files at any depth, whatever their case; masks only if so asked."""
    fill(tmp_path, "images/1.png", "images/2_mask.PNG", "images/raw/3.png", "masks/1.png")
    splits = open_folder(tmp_path)
    assert names(splits.train) == ["1.png", "2_mask.PNG", "3.png"]
    assert splits.left_out[0].startswith("1 image was left out as masks or annotations (masks)")
    excluded = open_folder(tmp_path, exclude="[*_mask.png,RAW/**]")
    assert names(excluded.train) == ["1.png"]
    assert excluded.left_out == splits.left_out
    assert len(open_folder(tmp_path, exclude="none").train) == 4
    assert len(open_folder(tmp_path, exclude=["none", "images/raw"]).train) == 3
    assert names(open_folder(tmp_path, train="masks").train) == ["1.png"]
    told = sentence(open_folder, tmp_path, train="mask")
    assert "data.train=mask matches no folder with images" in told
    assert "images, images/raw, masks" in told
    assert "data.test=x" in sentence(open_folder, tmp_path, test="x")
    assert "data.train=none" in sentence(open_folder, tmp_path, train="none")


def test_masks_in_the_folder_of_their_images_are_left_out(tmp_path: Path) -> None:
    """If nearly all that are called so belong to an image beside them."""
    for kind in ("benign", "normal"):
        fill(tmp_path, *(f"{kind}/{kind} ({i}){end}.png" for i in (1, 2) for end in ("", "_mask")))
    fill(tmp_path, "benign/benign (1)_mask_1.png")
    splits = open_folder(tmp_path)
    assert len(splits.train) == 4
    assert classes(splits.train) == ["benign", "benign", "normal", "normal"]
    assert splits.left_out[0].startswith(
        "5 images were left out as masks of the images beside them"
    )
    assert len(open_folder(tmp_path, exclude="none").train) == 9
    fill(tmp_path / "worn", "a.png", "a_mask.png", "b_mask.png", "c_mask.png")
    assert len(open_folder(tmp_path / "worn").train) == 4


def test_class_levels(tmp_path: Path) -> None:
    """The kingdom, the species, and no class at all."""
    fill(
        tmp_path,
        *(f"train/{k}/{s}/{i}.png" for k in "ab" for s in (f"{k}x", f"{k}y") for i in "12"),
    )
    assert set(classes(open_folder(tmp_path).train) or []) == {"a", "b"}
    for level in (1, -1):
        found = classes(open_folder(tmp_path, class_level=level).train)
        assert set(found or []) == {"ax", "ay", "bx", "by"}
    assert open_folder(tmp_path, class_level=2).train.labels is None


def test_lost_found_and_folders_of_the_system_are_not_looked_into(tmp_path: Path) -> None:
    """Those of disk stations hold several folders for each image; it may be forbidden, too."""
    fill(tmp_path, "cat/1.jpg", "cat/@eaDir/1.jpg/SYNOPHOTO_THUMB_M.jpg", "$RECYCLE.BIN/2.jpg")
    (tmp_path / "lost+found").mkdir(mode=0)
    listed: list[bytes] = []
    scandir = os.scandir

    def seen(path: bytes) -> Any:
        listed.append(path)
        return scandir(path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(walk_module.os, "scandir", seen)
        assert names(open_folder(tmp_path).train) == ["1.jpg"]
    assert [os.path.basename(path) for path in listed] == [os.fsencode(tmp_path.name), b"cat"]
    assert len(open_folder(tmp_path, exclude=["none", "lost+found"]).train) == 3


def test_twenty_thousand_texts_cost_no_system_call(tmp_path: Path) -> None:
    """Thousands of texts beside the images; nor do images, where the listing tells their kind."""
    fill(tmp_path, "a.png", "b.png")
    for i in range(50):
        (tmp_path / f"{i}.txt").write_text("")
    calls: list[Any] = []
    stat = os.stat

    def counted(path: Any, **more: Any) -> Any:
        calls.append(path)
        return stat(path, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "stat", counted)
        open_auto(tmp_path)
    assert not [path for path in calls if os.fsdecode(path).endswith((".txt", ".png"))]


def test_images_of_kinds_that_are_not_read_are_counted(tmp_path: Path) -> None:
    """With what reads them, or how to say that they do not matter."""
    fill(tmp_path, "1.png")
    for name in ("1.CR2", "2.nef", "3.JXL"):
        (tmp_path / name).write_bytes(b"x")
    told = open_folder(tmp_path).left_out[0]
    assert told.startswith("3 images were left out, as .cr2, .jxl, .nef")
    assert "data.exclude='[*.cr2,*.jxl,*.nef]'" in told
    assert open_folder(tmp_path, exclude="[*.cr2,*.jxl,*.nef]").left_out == ()
    (tmp_path / "1.png").unlink()
    assert "convert them" in sentence(open_auto, tmp_path)


@pytest.mark.parametrize("name", ["a.zip", "a.tar.gz", "deep/down/a.7z"])
def test_archives_only_are_told_to_be_unpacked(tmp_path: Path, name: str) -> None:
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_bytes(b"x")
    told = sentence(open_auto, tmp_path)
    assert name in told
    assert "unpack" in told


@pytest.mark.parametrize("name", ["1.jpg", "set.tar", "data/deep/0.parquet"])
def test_archives_only_that_git_lfs_has_not_fetched(tmp_path: Path, name: str) -> None:
    """The cause and the cure, whatever the file should be."""
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12345\n"
    (tmp_path / name).write_bytes(pointer)
    told = sentence(lambda: read_facts(open_auto(tmp_path)))
    assert "git lfs pull" in told
    assert name in told


def test_pictures_of_runs_and_checks_are_no_data(tmp_path: Path) -> None:
    """A run in the folder that it trains on sees the same images when it is resumed."""
    fill(tmp_path, "a.png", "b/c.png")
    before = open_folder(tmp_path)
    for folder, files in (("runs/x", ("config.yaml", "environment.json")), ("d", ("check.json",))):
        fill(tmp_path / folder, "crops.png", "deep/pca.png")
        for name in files:
            (tmp_path / folder / name).write_text("{}")
    after = open_folder(tmp_path)
    assert after.train.digest() == before.train.digest()
    assert after.left_out[0].startswith("2 folders of runs or checks (d, runs/x) were left out")
    assert len(open_folder(tmp_path, exclude="none").train) == 6
    (tmp_path / "check.json").write_text("{}")  # written by `out=.`
    assert len(open_folder(tmp_path).train) == 2


@pytest.mark.parametrize("name", ["train.zip", "Training.tar", "ILSVRC_train.tar.gz"])
def test_train_in_an_archive_beside_held_out_images_is_refused(tmp_path: Path, name: str) -> None:
    """They would be trained on instead."""
    fill(tmp_path, "val/a/1.png", "val/b/2.png")
    (tmp_path / name).write_bytes(b"x")
    told = sentence(open_auto, tmp_path)
    assert name in told
    assert "not unpacked" in told
    assert len(open_auto(tmp_path, train=".").train) == 2
    fill(tmp_path, "train/a/3.png")
    splits = open_auto(tmp_path)
    assert (len(splits.train), len(splits.test or [])) == (1, 2)
    if name != "Training.tar":  # it holds nothing that can be read
        assert any("compressed archive" in sentence for sentence in splits.left_out)


def test_a_test_split_of_everything_is_refused(tmp_path: Path) -> None:
    fill(tmp_path, "a/1.png", "b/2.png")
    assert "data.test=. leaves no image" in sentence(open_folder, tmp_path, test=".")
