"""`dino-lite check`: what it reports, writes and refuses."""

from __future__ import annotations

import csv
import functools
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import ranks
from dino_lite.commands import check as command
from dino_lite.commands.check import run_check
from dino_lite.config import Config, compose, instantiate, put
from dino_lite.contracts import Crops, Progress, UserError
from dino_lite.data.auto import open_auto
from dino_lite.data.findings import (
    judge_classes,
    judge_duplicates,
    judge_files,
    judge_pixels,
    judge_speed,
)
from dino_lite.data.summary import split_table
from dino_lite.planning.plan import gather_facts, plan
from dino_lite.runs import timing
from dino_lite.runs.build import build
from dino_lite.runs.run import Run
from dino_lite.runs.timing import Loading, Training, compare
from images import sentence
from tiny import TINY, photos, tiny

KEYS = {
    *("data", "splits", "labels", "duplicates", "plan", "network", "speed"),
    *("findings", "ok", "seconds"),
}


@pytest.fixture(autouse=True)
def short_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two batches are enough to see that speed is measured."""
    monkeypatch.setattr(command, "time_loading", functools.partial(timing.time_loading, seconds=0))
    training = functools.partial(timing.time_training, longest=0.0)
    monkeypatch.setattr(command, "time_training", training)


@functools.cache
def composed(data: str) -> Config:
    return compose("check", [f"data={data}"])


def look(tmp_path: Path, *overrides: str, data: str = "auto") -> dict[str, Any]:
    """A check of a tiny run in this process; its check.json."""
    config = tiny(tmp_path / "runs", *overrides, data=data, primary="check")
    out = tmp_path / "out"
    report = run_check(put(config, "out", str(out)))
    assert json.loads((out / "check.json").read_text()) == report
    assert report.keys() == KEYS
    return report


def levels(report: dict[str, Any]) -> set[str]:
    return {finding["level"] for finding in report["findings"]}


def told(report: dict[str, Any]) -> str:
    return "\n".join(f"{found['level']}: {found['text']}" for found in report["findings"])


def table(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_embedded_set_is_fine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Both splits, labels, plan, speed and crops of images that are no files."""
    report = look(tmp_path, data="shapes")
    assert report["ok"]
    assert report["splits"]["train"]["num_images"] == 44
    assert report["splits"]["test"]["num_images"] == 20
    assert report["splits"]["train"]["classes"]["num_classes"] == 10
    assert report["speed"]["images_per_second"] > 0
    assert report["speed"]["bottleneck"] in ("loading", "training")
    assert {"key", "value", "reason"} == report["plan"][0].keys()
    assert sorted(os.listdir(tmp_path / "out")) == ["check.json", "crops.png"]
    printed = capsys.readouterr().out
    for words in ("train: 44 images", "10 classes", "duplicates:", "speed", "a run can start"):
        assert words in printed


def test_folder_without_labels_with_bad_files_and_copies(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Few bad files are a warning; bad and repeated ones are listed by path."""
    data = photos(tmp_path / "data", [f"{i:02}.png" for i in range(20)])
    (data / "20.png").write_bytes((data / "03.png").read_bytes())
    (data / "bad.jpg").write_bytes(b"no image")
    report = look(tmp_path, f"data.root={data}")
    assert report["ok"]
    assert report["labels"] == "all images are in one folder"
    assert report["splits"]["train"]["classes"] is None
    assert "warning: 1 of 22 images of train cannot be read" in told(report)
    assert "warning: 1 image (5%) equal to another" in told(report)
    assert [Path(row["path"]).name for row in table(tmp_path / "out" / "bad_files.csv")] == [
        "bad.jpg"
    ]
    listed = table(tmp_path / "out" / "duplicates.csv")
    assert [(row["kind"], row["split"], Path(row["path"]).name) for row in listed] == [
        ("first", "train", "03.png"),
        ("exact", "train", "20.png"),
    ]
    assert "bad.jpg: " in capsys.readouterr().out


def test_strips_a_few_pixels_wide_are_not_taken_for_each_other(tmp_path: Path) -> None:
    """Noise, each image its own, of which a hash of low frequencies sees next to nothing."""
    data = photos(tmp_path / "data", [f"{i}.png" for i in range(12)], size=(400, 1))
    report = look(tmp_path, f"data.root={data}")
    assert report["duplicates"]["near"]["num_surplus"] == 0


def test_crops_that_the_device_makes_are_timed_and_drawn(tmp_path: Path) -> None:
    """Cut out by the worker, or with small images in memory on the device as well."""
    data = photos(tmp_path / "data", [f"{i}.png" for i in range(9)])
    for of, root in (("auto", [f"data.root={data}"]), ("shapes", [])):
        report = look(tmp_path, "augment.where=device", *root, data=of)
        assert report["speed"]["loading"]["images_per_second"] > 0
        with Image.open(tmp_path / "out" / "crops.png") as drawn:
            assert np.asarray(drawn.convert("RGB")).std() > 10


def test_leak_between_splits_is_a_warning_of_its_own(tmp_path: Path) -> None:
    """An image of test that is in train too."""
    data = photos(tmp_path / "data", [f"train/{i}.png" for i in range(200)])
    photos(data, [f"test/{i}.png" for i in range(2)])  # the first two again
    report = look(tmp_path, f"data.root={data}")
    assert "warning: 2 images of test found in train as well (2 exactly, 0 nearly)" in told(report)
    assert report["duplicates"]["exact"]["num_test_images_in_train"] == 2


def test_too_many_bad_files_fail(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """More than loader.max_bad_fraction; a larger fraction lets it pass."""
    data = photos(tmp_path / "data", [f"{i}.png" for i in range(8)])
    for i in range(2):
        (data / f"bad{i}.png").write_bytes(b"")
    report = look(tmp_path, f"data.root={data}")
    assert not report["ok"]
    assert "error: 2 of 10 images of train cannot be read, more than" in told(report)
    assert "a run would fail" in capsys.readouterr().out
    assert look(tmp_path, f"data.root={data}", "loader.max_bad_fraction=0.3")["ok"]


def test_no_readable_image_fails_with_all_reasons(tmp_path: Path) -> None:
    """Nothing can be planned or timed, yet everything is listed."""
    (tmp_path / "data").mkdir()
    for i in range(3):
        (tmp_path / "data" / f"{i}.jpg").write_bytes(b"no image")
    report = look(tmp_path, f"data.root={tmp_path / 'data'}")
    assert not report["ok"]
    assert "error: dino-lite pretrain would fail: None of the 3 images" in told(report)
    assert report["plan"] is report["speed"] is None
    assert len(table(tmp_path / "out" / "bad_files.csv")) == 3


def test_what_the_plan_refuses_fails(tmp_path: Path) -> None:
    """Numbers that do not go together with this data."""
    data = photos(tmp_path / "data", ["a.png", "b.png"])
    report = look(tmp_path, f"data.root={data}", "augment.global_size=17")
    assert not report["ok"]
    assert "error: dino-lite pretrain would fail: augment.global_size=17" in told(report)


def test_what_the_build_refuses_fails(tmp_path: Path) -> None:
    """A backbone that there is not is found out before a run is, and the data is described."""
    report = look(tmp_path, "backbone.name=vit_nowhere", data="shapes")
    assert not report["ok"]
    assert "error: dino-lite pretrain would fail: " in told(report)
    assert "vit_nowhere" in told(report)
    assert report["speed"] is None


def test_one_image_is_enough_to_check(tmp_path: Path) -> None:
    """And too little to learn from."""
    data = photos(tmp_path / "data", ["a.png"])
    report = look(tmp_path, f"data.root={data}")
    assert report["ok"]
    assert "loader.batch_size=8 is more than 1 image" in told(report)
    assert "1 image: few to learn" in told(report)


def test_npz_works_and_gray_images_get_a_hint(tmp_path: Path) -> None:
    """Arrays have sizes and moments, no files; gray ones an augmentation of their own."""
    pixels = np.random.default_rng(0).integers(0, 256, (30, 20, 24), dtype=np.uint8)
    np.savez(tmp_path / "set.npz", x_train=pixels, y_train=np.arange(30) % 3, x_test=pixels[:4])
    report = look(tmp_path, f"data.root={tmp_path / 'set.npz'}")
    train = report["splits"]["train"]
    assert report["ok"]
    assert train["formats"] == {}
    assert (train["num_bytes"], train["num_gray"]) == (0, 30)
    assert train["longer_side"] == {"min": 24, "median": 24, "max": 24}
    assert train["mean"] == pytest.approx([pixels.mean() / 255] * 3, abs=0.01)
    assert "hint: 100% of the images are gray: augment=grayscale" in told(report)
    assert "4 images of test found in train as well" in told(report)


def test_a_sample_of_a_huge_set(tmp_path: Path) -> None:
    """max_images of each split are looked at, and the report says so; a fraction is of them."""
    data = photos(tmp_path / "data", [f"{i:02}.png" for i in range(30)])
    report = look(tmp_path, f"data.root={data}", "max_images=10")
    assert report["splits"]["train"]["num_images"] == 30
    assert report["splits"]["train"]["num_looked_at"] == 10
    assert "hint: Of the 30 images of train, 10 were inspected" in told(report)


@pytest.mark.parametrize("value", ["0", "-3", "1.5", "true", "many"])
def test_impossible_max_images_are_refused(tmp_path: Path, value: str) -> None:
    """A number of images is a whole one."""
    with pytest.raises(UserError, match="max_images="):
        look(tmp_path, f"max_images={value}", data="shapes")


def test_out_is_written_anew(tmp_path: Path) -> None:
    """What an earlier check left is gone; what is not the check's stays."""
    out = tmp_path / "out"
    out.mkdir()
    for name in ("bad_files.csv", "duplicates.csv", "notes.txt"):
        (out / name).write_text("old")
    look(tmp_path, data="shapes")
    assert sorted(os.listdir(out)) == ["check.json", "crops.png", "notes.txt"]


def test_without_imagehash_the_rest_is_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line says what was left out, and how to have it."""
    monkeypatch.setattr(command, "find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "imagehash", None)
    report = look(tmp_path, data="shapes")
    assert report["ok"]
    assert report["duplicates"]["near"] is None
    assert "pip install 'dino-lite[check]'" in told(report)


def test_threads_are_left_alone(tmp_path: Path) -> None:
    """A caller's number of torch threads is the same afterwards."""
    torch.set_num_threads(2)
    look(tmp_path, data="shapes")
    assert torch.get_num_threads() == 2
    torch.set_num_threads(1)


def test_pack_writes_shards_and_says_how_to_use_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What was looked at can be trained from: as many images, of the same classes."""
    look(tmp_path, f"pack={tmp_path / 'shards'}", data="shapes")
    assert f"dino-lite pretrain data.root={tmp_path / 'shards'}" in capsys.readouterr().out
    packed = open_auto(tmp_path / "shards")
    assert packed.test is not None
    assert (len(packed.train), len(packed.test)) == (44, 20)
    assert packed.train.labels is not None


def test_where_nothing_can_be_written_is_said_before_anything_is_looked_at(tmp_path: Path) -> None:
    """A file in the way of `out`, a folder that `pack` would have to mix with."""
    (tmp_path / "file").write_text("")
    config = composed("shapes")
    assert "choose another folder" in sentence(
        run_check, put(config, "out", str(tmp_path / "file"))
    )
    assert "not empty" in sentence(run_check, put(config, "pack", str(tmp_path)))


def exit_code(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> object:
    """Of the command line, in this process."""
    keys = [f"{key}={value}" for key, value in TINY.items() if not key.startswith("data.")]
    monkeypatch.setattr(sys, "argv", ["check", *keys, *arguments])
    try:
        command.main()
    except SystemExit as end:
        return end.code
    return 0


@pytest.mark.slow
def test_exit_codes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """0 with warnings, 1 where a run would fail, 2 for a mistake, of which nothing is left."""
    photos(tmp_path / "good", ["a.png", "b.png"])
    photos(tmp_path / "bad", ["a.png"])
    (tmp_path / "bad" / "b.png").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    codes = {
        name: exit_code(monkeypatch, f"data.root={name}")
        for name in ("good", "bad", "empty", "nowhere")
    }
    assert codes == {"good": 0, "bad": 1, "empty": 2, "nowhere": 2}
    assert exit_code(monkeypatch, "data.root=good", "max_image=3") == 2
    assert (tmp_path / "checks" / "good" / "check.json").is_file()
    assert sorted(os.listdir(tmp_path / "checks")) == ["bad", "good"]
    assert "dino-lite: data.root=nowhere" in capsys.readouterr().err.replace(f"{tmp_path}/", "")


def test_command_line_ends_with_1_and_no_traceback(tmp_path: Path) -> None:
    """In a process of its own."""
    (tmp_path / "a.png").write_bytes(b"")
    result = ranks.command("check", f"data.root={tmp_path}", cwd=tmp_path)
    assert result.returncode == 1
    assert "error: 1 of 1 images of train cannot be read" in result.stdout
    assert result.stderr == ""


def test_every_key_of_a_run_is_a_key_of_its_check() -> None:
    """The same command line with another command, and three keys more."""
    ours, runs = compose("check", ["backbone=vit_tiny"]), compose("pretrain", ["backbone=vit_tiny"])
    assert {key: ours[key] for key in runs} == runs
    assert ours.keys() - runs.keys() == {"out", "max_images", "pack"}
    with pytest.raises(UserError, match="did you mean max_images"):
        compose("check", ["max_image=3"])


LOADING = Loading(50.0, None, 16)


@pytest.mark.parametrize(
    ("step", "workers", "cores", "feeds", "together", "bottleneck"),
    [
        (0.64, 4, 8, 200, 100, "training"),
        (0.32, 2, 8, 100, 100, "loading"),
        (0.32, 9, 2, 100, 100, "loading"),  # no more at once than there are cores
        (0.64, 0, 8, 50, 100 / 3, "loading"),  # one after the other
    ],
)
def test_speed_of_a_run_is_that_of_the_slower_part(
    step: float, workers: int, cores: int, feeds: float, together: float, bottleneck: str
) -> None:
    """Workers feed beside the device; without any, the two take turns."""
    found = compare(
        LOADING,
        Training(step, None),
        batch_size=64,
        num_devices=1,
        num_workers=workers,
        num_cores=cores,
        num_images=1000,
        num_epochs=2,
    )
    assert found["loading"]["images_per_second"] == feeds
    assert found["images_per_second"] == pytest.approx(together, abs=0.1)
    assert found["bottleneck"] == bottleneck
    assert found["seconds_per_run"] == pytest.approx(2000 / together, abs=0.1)


def test_advice_names_the_workers_that_would_keep_up() -> None:
    """More workers while there are cores, else what makes loading cheaper."""

    def advice(num_cores: int) -> str:
        numbers = {"batch_size": 64, "num_devices": 1, "num_workers": 2, "num_images": 10}
        training = Training(0.16, None)
        speed = compare(LOADING, training, num_cores=num_cores, num_epochs=None, **numbers)  # type: ignore[arg-type]
        (finding,) = judge_speed(speed | {"device": "cpu"})
        return finding.text

    assert "your 2 workers feed 100 images/s, this model trains 400; try loader.num_workers=8" in (
        advice(16)
    )
    assert "try loader.num_workers=4" in advice(4)
    assert "8 cores would keep up" in advice(2)


def test_a_batch_that_does_not_fit_is_a_warning() -> None:
    """It names the largest micro-batch that does."""
    speed = compare(
        LOADING, Training(9.0, 32), batch_size=256, num_devices=1, num_workers=8, num_cores=8,
        num_images=10, num_epochs=None,
    ) | {"device": "a device"}  # fmt: skip
    (finding,) = judge_speed(speed)
    assert finding.level == "warning"
    assert "trainer.micro_batch_size=32" in finding.text


def split(**changes: Any) -> dict[str, Any]:
    """What is needed of a described split."""
    usual = {
        "num_images": 5000, "num_looked_at": 5000, "num_readable": 5000, "num_misnamed": 0,
        "num_small": 0, "num_blank": 0, "num_gray": 0, "unreadable": [], "classes": None,
    }  # fmt: skip
    return usual | changes


def test_training_is_timed_up_to_the_batch_that_fits(tmp_path: Path) -> None:
    """Where memory ends, the time of the whole batch is that of as many parts as it takes."""
    asked = [("loader.num_workers", 0), ("loader.batch_size", 4)]
    config = composed("shapes")
    for key, value in [*TINY.items(), *asked]:
        config = put(config, key, value)
    splits = instantiate(config["data"])
    facts = gather_facts(config, splits)
    datamodule, module, _ = build(plan(config, facts).config, facts, splits, Run(tmp_path))
    loaded = timing.time_loading(datamodule, seconds=0)
    assert loaded.batch_size == 4
    sizes: list[int] = []

    def step(crops: Crops, at: Progress) -> None:
        sizes.append(crops.num_images)
        if crops.num_images > 8:
            raise torch.OutOfMemoryError

    module.bare_step = lambda: step  # type: ignore[assignment,method-assign,return-value]
    device = torch.device("cpu")
    assert timing.time_training(datamodule, module, loaded, 64, device).largest == 8
    assert sizes == [2, 2, 2, 4, 4, 8, 8, 16]
    assert timing.time_training(datamodule, module, loaded, 7, device).largest is None
    assert sizes[-2:] == [7, 7]


def test_a_slow_step_is_extrapolated() -> None:
    """A fixed part, and one that grows with the images: from two sizes to any."""
    line = timing._extrapolate((4, 1.4), (8, 1.8), 128)
    assert line == pytest.approx(1.8 + 120 * 0.1125)  # no less than half the mean: times are noisy
    assert timing._extrapolate((4, 0.5), (8, 0.9), 128) == pytest.approx(0.1 + 0.1 * 128)
    assert timing._extrapolate((0, 0.0), (2, 12.0), 8) == pytest.approx(48)


def test_every_key_of_check_json_is_documented(tmp_path: Path, root: Path) -> None:
    """docs/check.md names each of them."""
    report = look(tmp_path, data="shapes")
    text = (root / "docs" / "check.md").read_text(encoding="utf-8")
    nested = [
        report, report["splits"]["train"], report["splits"]["train"]["classes"],
        report["duplicates"]["near"], report["speed"], *report["speed"].values(),
    ]  # fmt: skip
    keys = {key for part in nested if isinstance(part, dict) for key in part}
    assert {key for key in keys if f"`{key}`" not in text} == {"duplicates", "splits"}


@pytest.mark.parametrize(
    ("least", "most", "words"),
    [
        (32, 32, "shorter side       32 px"),
        (1, 12_345_678, "1 to 12,345,678 px, median 2"),
        (0.5, 2.5, "0.5 to 2.5 px, median 2"),
    ],
)
def test_spans_are_written_for_people(least: float, most: float, words: str) -> None:
    """One number where all are equal; thousands apart, and few digits."""
    side = {"min": least, "median": 2, "max": most, "histogram": []}
    sizes = dict.fromkeys(("shorter_side", "longer_side", "aspect", "megapixels"), side)
    rest = {"num_bytes": 10**9, "formats": {}, "modes": {}, "num_rotated": 0, "mean": []}
    text = split_table("train", split(**sizes, **rest))
    assert words in text
    assert text.startswith("train: 5,000 images, 1.0 GB")


def test_a_good_set_leaves_nothing_to_say() -> None:
    """No finding without a reason."""
    none = {"num_groups": 0, "num_surplus": 0, "num_test_images_in_train": 0}
    balanced = {
        "min": 9, "max": 11, "num_with_one_image": 0, "num_without_image": 0,
    }  # fmt: skip
    train, test = split(classes=balanced), split(classes=balanced)
    assert [
        *judge_files("train", train, 0.05),
        *judge_pixels(train, 256, 224),
        *judge_classes(train, test),
        *judge_duplicates({"exact": none, "near": none | {"distance": 4}}, 10_000),
    ] == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_small": 600}, "with a side below augment.global_size=224"),
        ({"num_blank": 60}, "of a single color"),
        ({"num_gray": 4900}, "augment=grayscale"),
        ({"num_images": 100}, "loader.batch_size=256 is more than 100 images"),
    ],
)
def test_each_property_of_the_pixels_has_its_sentence(changes: dict[str, Any], words: str) -> None:
    """One finding names it."""
    assert any(words in finding.text for finding in judge_pixels(split(**changes), 256, 224))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_with_one_image": 2}, "2 classes of train with one image"),
        ({"num_without_image": 1}, "1 class in test alone"),
        ({"min": 5, "max": 100}, "The largest class has 100 images, the smallest 5"),
    ],
)
def test_each_property_of_the_classes_has_its_sentence(changes: dict[str, Any], words: str) -> None:
    """One finding names it."""
    balanced = {"min": 9, "max": 11, "num_with_one_image": 0, "num_without_image": 0}
    (finding,) = judge_classes(split(classes=balanced | changes), None)
    assert words in finding.text


def test_test_split_without_labels_is_told() -> None:
    """Accuracies will be of train alone."""
    balanced = {"min": 9, "max": 11, "num_with_one_image": 0, "num_without_image": 0}
    (finding,) = judge_classes(split(classes=balanced), split())
    assert "test has none" in finding.text


def test_exif_and_wrong_suffix_do_no_harm(tmp_path: Path) -> None:
    """Turned and misnamed images are counted, and the run can start."""
    data = photos(tmp_path / "data", [f"{i}.png" for i in range(20)])
    exif = Image.Exif()
    exif[0x0112] = 8
    Image.open(data / "0.png").save(data / "turned.jpg", exif=exif)
    Image.open(data / "1.png").save(data / "misnamed.jpg", "PNG")
    report = look(tmp_path, f"data.root={data}")
    train = report["splits"]["train"]
    assert report["ok"]
    assert (train["num_rotated"], train["num_misnamed"]) == (1, 1)
    assert train["formats"] == {"PNG": 21, "JPEG": 1}
    assert "hint: 1 file of train with another format" in told(report)
    assert "error" not in levels(report)
