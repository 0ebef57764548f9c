"""A trained run gets its pictures and baselines, and gets them later where they are missing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dino_lite.commands.pretrain import run_pretrain
from dino_lite.contracts import UserError
from dino_lite.eval import gallery
from dino_lite.runs import finish
from tiny import tiny, train

pytestmark = pytest.mark.slow

PICTURES = ("attention.png", "pca.png", "neighbors.png")


def state(run: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((run / "results.json").read_text())
    return content


def test_what_is_missing_is_made_by_the_same_command_without_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A picture that was removed; the weights are not touched, the others not drawn anew."""
    run = train(tmp_path)
    assert all((run / name).is_file() for name in PICTURES)
    assert state(run)["trained"]
    assert state(run)["finished"]
    kept = {path: path.stat().st_mtime_ns for path in run.rglob("*.png")}
    kept[run / "checkpoints" / "last.ckpt"] = (run / "checkpoints/last.ckpt").stat().st_mtime_ns
    (run / "pca.png").unlink()
    del kept[run / "pca.png"]
    assert train(tmp_path) == run
    assert (run / "pca.png").is_file()
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert "is finished" in capsys.readouterr().out


def test_a_failure_after_training_leaves_a_trained_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same command measures what was not measured, and trains no step."""

    def failing(*arguments: Any) -> None:
        raise RuntimeError("no memory for this")

    asked = tiny(tmp_path, "baselines=true")
    with monkeypatch.context() as patch:
        patch.setattr(finish, "knn_against_baselines", failing)
        with pytest.raises(RuntimeError, match="no memory"):
            run_pretrain(asked)
    (run,) = [path.parent for path in tmp_path.glob("*/config.yaml")]
    assert state(run)["trained"]
    assert "finished" not in state(run)
    saved = (run / "checkpoints" / "last.ckpt").stat().st_mtime_ns
    results = run_pretrain(asked)
    assert results["finished"]
    assert "knn_trained" in results
    assert (run / "checkpoints" / "last.ckpt").stat().st_mtime_ns == saved


def test_a_picture_that_fails_blocks_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever it raises; the run is finished, and the picture drawn once it can be."""

    def failing(*arguments: Any) -> None:
        raise RuntimeError("no such font")

    with monkeypatch.context() as patch:
        patch.setitem(gallery.QUICK, "pca", failing)
        run = train(tmp_path)
    assert "pca.png was not drawn: no such font" in capsys.readouterr().out
    assert state(run)["finished"]
    assert not (run / "pca.png").exists()
    train(tmp_path)
    assert (run / "pca.png").is_file()


def test_a_run_that_is_trained_again_keeps_nothing_of_before(tmp_path: Path) -> None:
    """Its checkpoint was deleted: results and pictures are those of the new weights."""
    run = train(tmp_path)
    planted = state(run) | {"knn_trained": 99.99, "last": {"knn": {"value": 1.0}}}
    (run / "results.json").write_text(json.dumps(planted))
    (run / "pca.png").write_bytes(b"old")
    (run / "checkpoints" / "last.ckpt").unlink()
    with pytest.raises(UserError, match="interrupted"):
        train(tmp_path, "callbacks.stop={_target_: tiny.StopAt, step: 3}")
    assert not (run / "results.json").exists()
    assert not (run / "pca.png").exists()
    assert train(tmp_path) == run
    assert {"knn_trained", "last"} & state(run).keys() == set()
    assert state(run)["steps"] == 8
    assert (run / "pca.png").read_bytes() != b"old"
