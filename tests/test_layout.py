"""Splits, classes and exclusions follow from folder names and counts, without a file."""

from __future__ import annotations

import itertools
import json
import posixpath
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from dino_lite.data.class_names import name_classes
from dino_lite.data.layout import read_layout


def expand(pattern: str) -> list[str]:
    """`{a,b}` and `{0-3}` are alternatives, as in layouts.json."""

    def choices(part: str) -> list[str]:
        if not part.startswith("{"):
            return [part]
        if numbers := re.fullmatch(r"\{(\d+)-(\d+)\}", part):
            return [str(i) for i in range(int(numbers[1]), int(numbers[2]) + 1)]
        return part[1:-1].split(",")

    return ["".join(c) for c in itertools.product(*map(choices, re.split(r"(\{[^}]*\})", pattern)))]


class Read:
    """What `read_layout` makes of files: numbers of images, classes, and sentences."""

    def __init__(self, files: list[str], level: int = 0, **asked: Any) -> None:
        images = [f for f in files if re.search(r"\.(png|jpe?g)$", f.lower())]
        images = [f for f in images if not re.search(r"(^|/)\.", f)]
        folders = dict(Counter(map(posixpath.dirname, images)))
        names: dict[str, list[str]] = {}
        for file in images:
            names.setdefault(posixpath.dirname(file), []).append(posixpath.basename(file))
        found = read_layout(folders, lambda folder: names.get(folder, []), **asked)
        train, test = name_classes(found.train, found.test, level)
        self.train = sum(folders[f] for f in train)
        self.test = sum(folders[f] for f in test) or None
        self.classes = sorted({str(name) for name in train.values()})
        self.test_classes = sorted({str(name) for name in test.values()})
        self.folders = (found.train_folder, found.test_folder)
        self.left_out = found.left_out
        assert self.train + (self.test or 0) + sum(map(number, self.left_out)) == len(images)


def number(sentence: str) -> int:
    return int(sentence.partition(" ")[0].replace(",", ""))


def of(*patterns: str, **asked: Any) -> Read:
    return Read([file for pattern in patterns for file in expand(pattern)], **asked)


def test_the_shared_cases(shared: Path) -> None:
    """Those that are trees, shards of flat members, or members of one tar."""
    cases = json.loads((shared / "cases" / "layouts.json").read_text())
    for case in cases:
        shards = [f"{s}/{i}.png" for s, n in case.get("shards", {}).items() for i in range(n)]
        if set(case) & {"csv", "heic"} or ("tree" in case and shards):
            continue
        patterns = case.get("tree", []) + case.get("members", [])
        found = Read([f for pattern in patterns for f in expand(pattern)] + shards)
        assert (found.train, found.test) == (case["train"], case.get("test")), case["id"]
        if case.get("classes"):
            assert found.classes == sorted(case["classes"]), case["id"]
        elif "classes" in case:
            assert len(found.classes) == 1, case["id"]
        if case.get("test_labels") is False:
            assert not set(found.test_classes) & set(found.classes), case["id"]
        if case.get("warns"):
            assert any("left out" in s and "data." in s for s in found.left_out), case["id"]


TWO = "{a,b}/{0-3}.png"


@pytest.mark.parametrize(
    ("patterns", "train", "test", "classes"),
    [
        ([f"TRAIN/{TWO}", f"Validation/{TWO}"], 8, 8, ["a", "b"]),
        ([f"train/{TWO}", f"dev/{TWO}"], 8, 8, ["a", "b"]),
        ([f"trainval/{TWO}", f"test/{TWO}"], 8, 8, ["a", "b"]),
        ([f"train_2017/{TWO}", f"eval_2019/{TWO}"], 8, 8, ["a", "b"]),
        ([f"train-0/{TWO}", f"train-1/{TWO}", f"test-0/{TWO}"], 16, 8, ["a", "b"]),
        ([f"seg_train/seg_train/{TWO}", f"seg_test/seg_test/{TWO}"], 8, 8, ["a", "b"]),
        ([f"training_set/training_set/{TWO}", f"test_set/test_set/{TWO}"], 8, 8, ["a", "b"]),
        (["trainA/{0-3}.jpg", "trainB/{0-3}.jpg", "testA/{0-1}.jpg", "testB/{0-1}.jpg"], 8, 4, 1),
        ([f"x/y/train/{TWO}", f"x/y/val/{TWO}"], 8, 8, ["a", "b"]),
        ([f"train/images/{TWO}", f"val/images/{TWO}"], 8, 8, ["a", "b"]),
        (["train/{a,b}/images/{0-3}.png", "val/{a,b}/images/{0-3}.png"], 8, 8, ["a", "b"]),
        (["{a,b}/train/{0-3}.png", "{a,b}/test/{0-1}.png"], 8, 4, ["a", "b"]),
        (["{a,b}/train/good/{0-3}.png", "{a,b}/test/{good,bad}/{0-1}.png"], 8, 8, ["a", "b"]),
        (["imagenet-train-{000,001}/{0-3}.png", "imagenet-val-000/{0-1}.png"], 8, 2, 1),
        (
            ["data/train-0000{0,1}-of-00002-ab12/{0-3}.png", "data/test-00000-of-00001-9f/0.png"],
            8,
            1,
            1,
        ),
        ([f"train/{TWO}"], 8, None, ["a", "b"]),
        (["val/{a,b}/{0-3}.png", "test/{a,b}/{0-1}.png"], 12, None, ["a", "b"]),
        (["test/{0-3}.jpg", "harbor/{0-3}.jpg"], 8, None, ["harbor", "test"]),
        (["train/{0-3}.jpg", "bus/{0-3}.jpg"], 8, None, ["bus", "train"]),
        (
            ["trainer/{0-3}.jpg", "contest/{0-3}.jpg", "latest/0.jpg"],
            9,
            None,
            ["contest", "latest", "trainer"],
        ),
        (["train_images/{0-3}.jpg", "test/{0-3}.jpg"], 4, 4, 1),
        (["wrap/{cat,dog}/{0-3}.jpg"], 8, None, ["cat", "dog"]),
        (["with_mask/{0-3}.jpg", "without_mask/{0-3}.jpg"], 8, None, ["with_mask", "without_mask"]),
        (
            ["photo/{dog,elephant}/{0-3}.jpg", "sketch/{dog,elephant}/{0-3}.jpg"],
            16,
            None,
            ["photo", "sketch"],
        ),
        (["20{19,20,21}/{0-3}.jpg"], 12, None, ["2019", "2020", "2021"]),
        (["猫/{0-3}.jpg", "犬/{0-3}.jpg"], 8, None, ["犬", "猫"]),
        (["{normal,defective}/{0-9}.jpg"], 20, None, ["defective", "normal"]),
        (["{mask,nomask}/{0-9}.jpg"], 20, None, ["mask", "nomask"]),
        (["{GT,sedan}/car{0-9}.jpg"], 20, None, ["GT", "sedan"]),
        (["{depth,surface,label}/{0-9}.png"], 30, None, ["depth", "label", "surface"]),
        (["Normal Images/n{0-3}.jpg", "Glaucoma Images/g{0-3}.jpg"], 8, None, 2),
        (["mask/{0-3}.jpg", "photo_album/{4-7}.jpg", "lamp/{8-9}.jpg"], 10, None, 3),
        (["train_mini/{a,b}/{0-3}.jpg", "val/{a,b}/0.jpg"], 8, 2, ["a", "b"]),
        (["Training/{a,b}/{0-3}.jpg", "PublicTest/{a,b}/0.jpg"], 8, 2, ["a", "b"]),
        (["train/{0-3}.jpg", "test_public/{0-1}.jpg", "test_private/{0-1}.jpg"], 4, 4, 1),
        (["01_train/{a,b}/{0-3}.jpg", "02_test/{a,b}/0.jpg"], 8, 2, ["a", "b"]),
        (["VOCtrainval_06-Nov-2007/{0-3}.jpg", "VOCtest_06-Nov-2007/{0-1}.jpg"], 4, 2, 1),
        (["VOC2012_train/{0-3}.jpg", "VOC2007_test/{0-1}.jpg"], 4, 2, 1),
        (["trainset/{a,b}/{0-3}.jpg", "testset/{a,b}/0.jpg"], 8, 2, ["a", "b"]),
        (["default/partial-train/0000/{0-3}.jpg", "default/test/0000/{0-1}.jpg"], 4, 2, 1),
        (["0000{0,1}-train/{0-3}.jpg", "00000-val/{0-1}.jpg"], 8, 2, 1),
        (["contest/{0-3}.jpg", "retrain/{0-3}.jpg", "evaluate/0.jpg"], 9, None, 3),
        (["train_station/{0-3}.jpg", "test_track/{0-3}.jpg"], 8, None, 2),
        (["{gloves,helmets,masks}/{0-3}.jpg"], 12, None, ["gloves", "helmets", "masks"]),
    ],
)
def test_splits_and_classes(
    patterns: list[str], train: int, test: int | None, classes: Any
) -> None:
    """Nothing is left out, and held-out images are never trained on."""
    found = of(*patterns)
    assert (found.train, found.test, found.left_out) == (train, test, [])
    assert found.classes == classes if isinstance(classes, list) else len(found.classes) == classes


@pytest.mark.parametrize(
    ("patterns", "train", "test", "words"),
    [
        (
            ["train2017/{0-3}.jpg", "val2017/{0-1}.jpg", "unlabeled2017/{0-2}.jpg"],
            4,
            2,
            "unlabeled2017",
        ),
        ([f"train/{TWO}", f"val/{TWO}", "{0-2}.jpg"], 8, 8, "the folder itself"),
        ([f"train/{TWO}", f"valid/{TWO}", "test/{0-2}.png"], 8, 8, "data.test=test"),
        (["img/{0-3}.jpg", "gt/{4-6}.png"], 4, None, "gt"),
        (["images/{0-3}.jpg", "annotations/trimaps/{0-2}.png"], 4, None, "annotations"),
        (["images/{train,val}/{0-1}.jpg", "masks/{train,val}/{0-1}.png"], 2, 2, "masks"),
        (["{train,test}/images/{0-1}.jpg", "{train,test}/masks/{0-1}.png"], 2, 2, "masks"),
        (["{train,val}/{0-1}.png", "{trainannot,valannot}/{0-1}.png"], 2, 2, "trainannot"),
        (
            ["train/{a,b}.jpg", "train_masks/{a,b}_mask.gif.png", "test/{c,d}.jpg"],
            2,
            2,
            "train_masks",
        ),
        (
            ["leftImg8bit/{train,val}/x/{0-1}.png", "gtFine/{train,val}/x/{0-1}_gt.png"],
            2,
            2,
            "gtFine",
        ),
        (["{ab,cd}.jpg", "masks/{ab,cd}.png"], 2, None, "masks"),
        (["{cat,dog}/images/{0-1}.jpg", "{cat,dog}/labels/{0-1}.png"], 4, None, "labels"),
        (["pots/{ab,cd}.jpg", "pans/{ef,gh}.jpg", "masks/{ab,cd}.png"], 4, None, "masks"),
        (["x.jpg", "d/{train,test}/{a,b}/{0-1}.jpg"], 4, 4, "the folder itself"),
        (["N/N/{train,valid}/{a,b}/{0-1}.jpg", "test/test/{0-1}.jpg"], 4, 4, "test"),
        (["docs/{0-1}.png", "data/{train,test}/{a,b}/{0-1}.jpg"], 4, 4, "docs"),
        (["{train,validation,evaluation}/{a,b}/{0-1}.jpg"], 4, 4, "data.test=evaluation"),
        (
            ["{x,y}/{train,test}/{0-1}.png", "{x,y}/ground_truth/{0-1}_mask.png"],
            4,
            4,
            "ground_truth",
        ),
        (["train/0cdf_0{1,2}.jpg", "train_masks/0cdf_0{1,2}_mask.png"], 2, None, "train_masks"),
        (["inputs/{cat,dog}/{0-9}.jpg", "masks/{cat,dog}/{0-9}.png"], 20, None, "masks"),
        (["data/{cat,dog}/{0-9}.jpg", "masks/{cat,dog}/{0-9}.png"], 20, None, "masks"),
        (["2019/IMG_{0-3}.jpg", "2019/thumbs/IMG_{0-3}_thumb.jpg"], 4, None, "thumbs"),
        (["images/{0-3}.jpg", "labels/{0-3}.png", "depth/{0-3}.png"], 4, None, "depth"),
        (["images/{0-3}.jpg", ".cache/{0-3}.png"], 4, None, ""),
        (["a/{0-3}.jpg", "#recycle/{0-2}.jpg"], 4, None, "#recycle"),
    ],
)
def test_what_is_left_out_is_counted_and_named(
    patterns: list[str], train: int, test: int | None, words: str
) -> None:
    """With the key that takes it in."""
    found = of(*patterns)
    assert (found.train, found.test) == (train, test)
    if words:
        assert any(words in sentence and "data." in sentence for sentence in found.left_out)
    else:
        assert found.left_out == []  # hidden


@pytest.mark.parametrize(
    "patterns",
    [
        ["train2017/{0-3}.jpg", "val2017/{0-1}.jpg", "unlabeled2017/{0-2}.jpg"],
        ["{train,val}/{train,bus,car}/{0-1}.jpg", "unlabeled/{0-2}.jpg"],
        ["{train,valid,test}/{a,b}/{0-2}.png"],
        ["{x,y}/{train,val,test}/{0-2}.png"],
        ["{train,val,test}/{images,masks}/{0-9}.png"],
        ["train/{0-3}.jpg", "val/{0-1}.jpg", "odd, [one]/{0-2}.jpg"],
        ["wrap/{train,val}/{0-1}.jpg", "more/{0-2}.jpg", "wrap/more/{0-1}.jpg"],
        ["{train,val}/{a,b}/{0-1}.jpg", "{0-2}.jpg"],
        ["images/{0-3}.jpg", "masks/{0-3}.png"],
    ],
)
def test_the_key_that_a_sentence_names_takes_in_what_it_counts(patterns: list[str]) -> None:
    """And nothing that another sentence counts; held-out images stay out unless it says so."""
    files = [file for pattern in patterns for file in expand(pattern)]
    before = Read(files)
    assert before.left_out
    for sentence in before.left_out:
        keys = dict(re.findall(r"data\.(train|test|exclude)=('\[[^']*\]'|\S+)", sentence))
        asked = {key: value.strip("'[]").split(",") for key, value in keys.items()}
        asked = {key: [] if value == ["none"] else value for key, value in asked.items()}
        if "exclude" in asked:
            assert not any("masks or" in each for each in Read(files, exclude=False).left_out)
            continue
        after = Read(files, **asked)
        grown = after.train - before.train
        if asked.get("test"):
            assert (grown, after.test) == (0, number(sentence)), sentence
        elif "test" in asked:
            assert after.train == len(files), sentence
        else:
            assert (grown, after.test) == (number(sentence), before.test), sentence


def test_nothing_is_excluded_if_so_asked() -> None:
    assert of("images/{0-3}.jpg", "masks/{0-3}.png", exclude=False).train == 8


def test_splits_that_the_user_names() -> None:
    """Patterns of folders, also for what would be left out; what they do not name is counted."""
    files = [
        "train/{a,b}/{0-3}.png",
        "valid/{a,b}/{0-1}.png",
        "test/{a,b}/{0-2}.png",
        "more/{a,b}/0.png",
    ]
    assert (of(*files, test=["test"]).train, of(*files, test=["test"]).test) == (8, 6)
    both = of(*files, train=["train", "more"])
    assert (both.train, both.test, both.classes) == (10, 4, ["a", "b"])
    every = of(*files, train=["."], test=[])
    assert (every.train, every.test, every.left_out, every.classes) == (20, None, [], ["a", "b"])
    some = of(*files, train=["t*"], test=["MORE/*"])
    assert (some.train, some.test) == (14, 2)
    assert [number(sentence) for sentence in some.left_out] == [4]
    assert of("x/1/{0-3}.png", "x/2/{0-1}.png", train=["x/1"], test=["x/2"]).test == 2
    assert of(*files, train=["nowhere"]).train == 0


def test_the_class_is_the_folder_at_a_level() -> None:
    """Kingdom or species; a last folder called images is none."""
    files = ["train/{animal,plant}/{x,y}/images/{0-3}.png"]
    assert of(*files).classes == ["animal", "plant"]
    assert of(*files, level=1).classes == of(*files, level=-1).classes == ["x", "y"]
    assert of("a/{0-1}.png", "b/c/{0-1}.png", level=1).classes == ["None", "c"]


def test_the_folder_of_a_split_is_told() -> None:
    """Paths are stored relative to it, so that digests are those of earlier versions."""
    assert of(f"train/{TWO}", f"val/{TWO}").folders == ("train", "val")
    assert of(f"train/{TWO}").folders == ("train", "")
    assert of(TWO).folders == of("x/{0-1}.png").folders == ("", "")


def test_every_image_is_in_one_place_whatever_the_names() -> None:
    """`Read` holds the sum of train, test and sentences against the number of images; every three
    folders occur, with some of the pairs below them.
    """
    names = ["train", "val", "test", "masks", "images", "a", "train2", "seg_test", "labels"]
    chosen, below = (itertools.combinations(names, many) for many in (3, 2))
    for three, two in [*itertools.product(chosen, below)][::11]:
        of(*(f"{name}/{inner}/{{0-1}}.png" for name in three for inner in two), "x.png")


def test_a_million_images_take_no_longer_than_their_folders() -> None:
    """Counts are numbers, and names of images are asked for beside masks only."""

    def never(folder: str) -> list[str]:
        raise AssertionError(folder)

    folders = {f"train/n{i:05}": 1000 for i in range(1000)} | {"val/n00000": 50}
    found = read_layout(folders, never)
    assert len(found.train) == 1000
    assert len(name_classes(found.train, found.test)[1]) == 1
