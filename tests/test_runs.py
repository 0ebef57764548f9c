"""`dino-lite runs`: what the list says of each run, whatever else lies in the folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from dino_lite.commands.runs import runs, table
from dino_lite.contracts import UserError
from dino_lite.runs import finish
from dino_lite.runs.listing import Listed, list_runs
from dino_lite.runs.run import Run
from tiny import train


def fake(folder: Path, results: dict[str, object] | None = None, **trainer: object) -> Run:
    """The small files of a run on 100 images, without weights."""
    run = Run(folder)
    run.checkpoints.mkdir(parents=True)
    config = {
        "backbone": {"name": "vit_tiny_patch16_224", "_target_": "dino_lite.backbones.vit.ViT"},
        "method": {"_target_": "dino_lite.methods.dinov2.DINOv2"},
        "choices": {"method": "dinov3"},
        "trainer": {"max_steps": None, "max_epochs": None, "max_time": None} | trainer,
        "loader": {"batch_size": 8},
    }
    run.config_file.write_text(yaml.safe_dump(config))
    run.environment_file.write_text(json.dumps({"data": {"num_images": 100}, "request": {}}))
    run.results_file.write_text(json.dumps(results or {}))
    return run


def aged(run: Run, seconds: float) -> Run:
    run.last.write_bytes(b"weights")
    os.utime(run.last, (seconds, seconds))
    return run


def test_each_run_is_listed_with_what_is_known(tmp_path: Path) -> None:
    """State, length, accuracies, size; newest checkpoint first."""
    whole = {"trained": True, "finished": True, "steps": 9, "train_seconds": 1}
    knn = {"knn_trained": 60.0, "knn_untrained": 30.0, "knn_raw_pixels": 20.0}
    aged(fake(tmp_path / "finished", whole | knn, max_steps=9), 4e8)
    aged(fake(tmp_path / "trained", {"trained": True, "steps": 5}, max_time="5m"), 3e8)
    stopped = aged(fake(tmp_path / "stopped", {"last": {"knn": {"top1": 40.0}}}, max_epochs=2), 2e8)
    metrics = "step,knn,loss\n0,12,\n" + "1,,3\n" * 30_000 + "6,,2\n7,13"  # half a row at the end
    (stopped.folder / "metrics.csv").write_text(metrics)
    aged(fake(tmp_path / "timed", {"estimate": {"steps": 70}}, max_time="5m"), 1e8)
    found = {run.name: run for run in list_runs(tmp_path)}
    assert list(found) == ["finished", "trained", "stopped", "timed"]
    assert [run.state for run in found.values()] == [
        *("finished", "trained", "interrupted", "interrupted")
    ]
    assert [(run.steps, run.total) for run in found.values()] == [(9, 9), (5, 5), (7, 25), (0, 70)]
    assert [run.knn for run in found.values()] == [60.0, None, 40.0, None]
    assert found["finished"].knn_untrained == 30.0
    assert found["stopped"].method == "dinov3"
    assert found["stopped"].num_bytes == sum(
        file.stat().st_size for file in stopped.folder.rglob("*") if file.is_file()
    )


def test_a_run_that_is_being_trained_says_so(tmp_path: Path) -> None:
    """As long as its process holds the lock, and looking does not keep the lock."""
    pytest.importorskip("fcntl")
    run, done = fake(tmp_path / "a", max_steps=3), fake(tmp_path / "b", {"trained": True})
    with run.locked(), done.locked():
        assert {each.state for each in list_runs(tmp_path)} == {"training", "finishing"}
    assert {each.state for each in list_runs(tmp_path)} == {"empty", "trained"}
    with run.locked():
        pass


def test_damaged_and_foreign_folders_do_no_harm(tmp_path: Path) -> None:
    """A file, a folder of something else, the cache of features; torn and odd files of runs."""
    (tmp_path / "file").touch()
    (tmp_path / "photos").mkdir()
    fake(tmp_path / ".features")
    for number, text in enumerate((b"", b"{", b"[1]", b"a: &x [*x]", b"\xff\xfe", b"trainer: 3")):
        run = fake(tmp_path / f"torn_{number}")
        for file in (run.config_file, run.results_file, run.environment_file):
            file.write_bytes(text)
        (run.folder / "metrics.csv").write_bytes(text)
    fake(tmp_path / "odd", {"steps": "many", "knn_trained": "good", "last": 3}, max_steps="few")
    names = {run.name: run.state for run in list_runs(tmp_path)}
    assert names.keys() == {*(f"torn_{number}" for number in range(6)), "odd"}
    assert names["torn_0"] == "damaged"


def test_a_run_itself_and_the_folder_above_are_understood(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And where there is no run yet, that is said; weights alone are named as such."""
    monkeypatch.chdir(tmp_path)
    assert runs() == runs(".") == []
    assert "no run in runs yet: dino-lite pretrain FOLDER makes" in capsys.readouterr().out
    first, second = fake(tmp_path / "runs" / "a"), fake(tmp_path / "runs" / "b")
    assert [run["name"] for run in runs("runs/a")] == ["a"]
    assert {run["name"] for run in runs(".")} == {"a", "b"} == {run["name"] for run in runs()}
    monkeypatch.chdir(second.folder)
    assert [run["name"] for run in runs(".")] == ["b"]
    first.config_file.unlink()
    aged(first, 0.0)
    capsys.readouterr()
    assert [run["state"] for run in runs(str(first.folder))] == ["no config.yaml"]
    assert capsys.readouterr().out.rstrip().endswith(" B")


def test_the_table_says_it_in_a_line_each() -> None:
    """Columns without any value are left out."""
    first = Listed(
        "a", "finished", "dino", "vit", 9000, 9000, 51.84, 40.0, 44.2, None, 0.0, 2 << 20
    )
    other = first._replace(name="bb", steps=7, knn=None, knn_raw_pixels=None, num_bytes=3 << 35)
    assert table([first, other], 7300.0) == [
        "run  state     method  backbone       steps           k-NN  raw pixels  age    size",
        "a    finished  dino    vit            9,000         51.8 %      44.2 %  2 h  2.1 MB",
        "bb   finished  dino    vit       7 of 9,000  online 40.0 %              2 h  103 GB",
    ]


def test_the_command_lists_and_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A real run, by a path alone; an empty folder and a missing one."""
    monkeypatch.setattr(finish, "QUICK", {})
    name = train(tmp_path / "runs", "trainer.max_steps=2").name
    capsys.readouterr()
    out = tmp_path / "list.json"
    (told,) = runs(str(tmp_path / "runs"), f"out={out}")
    assert json.loads(out.read_text()) == [told]
    assert (told["name"], told["state"], told["steps"]) == (name, "finished", 2)
    assert f"{name}  finished  dino    vit       " in capsys.readouterr().out
    (tmp_path / "none").mkdir()
    assert runs(str(tmp_path / "none")) == []
    assert "There is no run in" in capsys.readouterr().out
    with pytest.raises(UserError, match="cannot be read"):
        runs(f"runs_dir={tmp_path / 'nowhere'}")
    with pytest.raises(UserError, match=r"ends in \.json"):
        runs("out=list.txt")


def test_listing_imports_no_torch() -> None:
    """Which alone would take seconds."""
    code = "import sys, dino_lite.commands.runs; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
