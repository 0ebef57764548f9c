"""A trained run gets its pictures and baselines, and gets them later where they are missing."""

from __future__ import annotations

import json
from datetime import datetime
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dino_lite.contracts import Splits, UserError
from dino_lite.eval import gallery
from dino_lite.eval.baselines import knn_against_baselines
from dino_lite.eval.curves import read_curves
from dino_lite.eval.verdict import verdict
from dino_lite.planning.plan import open_splits
from dino_lite.report.page import page
from dino_lite.report.story import read_story
from dino_lite.runs import finish, pretraining
from dino_lite.runs.checkpoint import find_checkpoint
from dino_lite.runs.pretraining import run_pretrain
from test_pictures import first_broken
from tiny import tiny, train

pytestmark = pytest.mark.slow

PICTURES = ("attention.png", "pca.png", "neighbors.png")
SHORT = "trainer.max_steps=2"


def state(run: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((run / "results.json").read_text())
    return content


def test_what_is_missing_is_made_by_the_same_command_without_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A picture that was removed; the weights are not touched, the others not drawn anew."""
    run = train(tmp_path, SHORT)
    assert all((run / name).is_file() for name in PICTURES)
    assert state(run)["trained"]
    assert state(run)["finished"]
    kept = {path: path.stat().st_mtime_ns for path in run.rglob("*.png")}
    kept[run / "checkpoints" / "last.ckpt"] = (run / "checkpoints/last.ckpt").stat().st_mtime_ns
    (run / "pca.png").unlink()
    del kept[run / "pca.png"]
    assert train(tmp_path, SHORT) == run
    assert (run / "pca.png").is_file()
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    out = capsys.readouterr().out
    assert "is finished" in out
    assert out.count("drawing attention.png, pca.png, neighbors.png from 44 images\n") == 1
    assert out.count("drawing pca.png from 44 images\n") == 1
    assert out.count("\nHealth: ") == out.count("\nLoss: ") == 2


def test_a_failure_after_training_leaves_a_trained_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What was measured before is kept; the same command measures the rest, and trains no step.
    What cannot be measured at all is a sentence of the verdict, which the report repeats.
    """

    def failing(error: Exception) -> Any:
        def measure(*arguments: Any) -> Any:
            if isinstance(error, RuntimeError):
                yield next(knn_against_baselines(*arguments))
            raise error

        return measure

    monkeypatch.setattr(finish, "QUICK", {})
    asked = tiny(tmp_path, "baselines=true", SHORT)
    with monkeypatch.context() as patch:
        patch.setattr(finish, "knn_against_baselines", failing(RuntimeError("no memory for this")))
        with pytest.raises(RuntimeError, match="no memory"):
            run_pretrain(asked)
        (run,) = [path.parent for path in tmp_path.glob("*/config.yaml")]
        before = state(run)
        assert before["trained"]
        assert "finished" not in before
        saved = (run / "checkpoints" / "last.ckpt").stat().st_mtime_ns
        patch.setattr(finish, "knn_against_baselines", failing(UserError("it has diverged.")))
        assert run_pretrain(asked)["finished"]
        assert "k-NN was not measured: it has diverged." in capsys.readouterr().out
    results = run_pretrain(asked)
    assert results["finished"]
    assert results["knn_trained"] == before["knn_trained"]
    assert (run / "checkpoints" / "last.ckpt").stat().st_mtime_ns == saved
    out = capsys.readouterr().out
    assert "measuring k-NN on 64 images: untrained, raw pixels\n  1 of 2, untrained: " in out
    told = verdict(results, read_curves(run / "metrics.csv"))
    assert "against" in told[0]
    assert "10 classes: waves, checks, arcs, patchwork, mosaic and 5 more." in told
    html = page(read_story(find_checkpoint(str(run), "runs")), datetime(2026, 1, 2))
    for line in told:
        assert f"\n{line}\n" in out
        assert escape(line[1:].replace(" %", "\u00a0%")) in html


def test_a_test_split_without_a_label_is_not_measured_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Leave-one-out on train instead; the origin of the labels is the source's sentence, and an
    image that training and measurement met is counted once.
    """

    def unlabeled(node: Any) -> Splits:
        splits = open_splits(node)
        assert splits.test is not None
        splits.test.labels = np.full(len(splits.test), -1)
        train = first_broken(splits.train)
        return splits._replace(train=train, labels_from="the folders a, b")

    monkeypatch.setattr(pretraining, "open_splits", unlabeled)
    monkeypatch.setattr(finish, "QUICK", {})
    run = train(tmp_path, "baselines=true", "loader.max_bad_fraction=0.1")
    assert "leave-one-out on train (43 images)" in state(run)["knn_protocol"]
    out = capsys.readouterr().out
    assert "10 classes: the folders a, b" in out
    assert "1 image could not be read (bad_files.csv)" in out


def test_a_picture_that_fails_blocks_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever it raises; the run is finished, and the picture drawn once it can be."""

    def failing(*arguments: Any) -> None:
        raise RuntimeError("no such font")

    with monkeypatch.context() as patch:
        patch.setitem(gallery.QUICK, "pca", failing)
        run = train(tmp_path, SHORT)
    assert "pca.png was not drawn: no such font" in capsys.readouterr().out
    assert state(run)["finished"]
    assert not (run / "pca.png").exists()
    train(tmp_path, SHORT)
    assert (run / "pca.png").is_file()


def test_a_run_that_is_trained_again_keeps_nothing_of_before(tmp_path: Path) -> None:
    """Its checkpoint was deleted: results and pictures are those of the new weights."""
    run = train(tmp_path, SHORT)
    planted = state(run) | {"knn_trained": 99.99, "last": {"knn": {"value": 1.0}}}
    (run / "results.json").write_text(json.dumps(planted))
    (run / "pca.png").write_bytes(b"old")
    (run / "checkpoints" / "last.ckpt").unlink()
    with pytest.raises(UserError, match="interrupted"):
        train(tmp_path, SHORT, "callbacks.stop={_target_: tiny.StopAt, step: 1}")
    assert not (run / "results.json").exists()
    assert not (run / "pca.png").exists()
    assert train(tmp_path, SHORT) == run
    assert {"knn_trained", "last"} & state(run).keys() == set()
    assert state(run)["steps"] == 2
    assert (run / "pca.png").read_bytes() != b"old"
