"""`dino-lite pretrain` end to end: what a run leaves, resume, several processes, the clock."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import dino_lite
from dino_lite.commands.evaluate import run_evaluate
from dino_lite.commands.export import run_export
from dino_lite.config import compose, put
from dino_lite.contracts import UserError
from dino_lite.runs.pretraining import run_pretrain
from ranks import command
from tiny import WITH_PICTURES, checkpoint, photos, tiny, tiny_command, train


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished tiny run with its baselines."""
    return train(tmp_path_factory.mktemp("runs"), "baselines=true", WITH_PICTURES)


def assert_same(a: Any, b: Any, where: str = "", tolerance: float = 0.0) -> None:
    """Equal trees of tensors and plain values; with a tolerance, tensors are close."""
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}.{key}", tolerance)
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}[{i}]", tolerance)
    elif isinstance(a, torch.Tensor):
        if tolerance:
            torch.testing.assert_close(
                a, b, rtol=tolerance, atol=tolerance, msg=lambda m: f"{where}: {m}"
            )
        else:
            assert torch.equal(a, b), where
    else:
        assert a == b, where


@pytest.mark.slow
def test_run_leaves_everything_that_is_promised(run: Path) -> None:
    """Configuration, metrics, events, checkpoints, pictures, results and environment lie in the
    run's folder.
    """
    names = {path.name for path in run.iterdir()}
    promised = {
        "config.yaml",
        "metrics.csv",
        "checkpoints",
        "crops.png",
        "curves.png",
        "results.json",
        "environment.json",
    }
    assert promised <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"last.ckpt", "best.ckpt"}
    assert run.name.startswith("dino_shapes_vit_")


def test_results_hold_the_three_numbers(run: Path) -> None:
    """Raw pixels, untrained and trained k-NN in percent, and the training time."""
    results = json.loads((run / "results.json").read_text())
    for key in ("knn_raw_pixels", "knn_untrained", "knn_trained"):
        assert 0 <= results[key] <= 100
    assert results["train_seconds"] > 0
    assert results["finished"] is True
    assert results["steps"] == 8


def test_global_step_is_the_methods_step(run: Path) -> None:
    """Lightning counts the optimizer steps that the method counts."""
    content = checkpoint(run)
    assert content["global_step"] == int(content["state_dict"]["method.step"]) == 8


def test_metrics_follow_the_run(run: Path) -> None:
    """metrics.csv holds loss, rates and k-NN by step."""
    with open(run / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert {"step", "loss", "learning_rate", "momentum", "teacher_temp", "knn", "grad_norm"} <= set(
        rows[0]
    )
    assert [row["knn"] for row in rows if row["knn"]]


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_interrupted_and_resumed_run_is_bit_equal_to_one_that_was_not(
    tmp_path: Path, workers: int
) -> None:
    """Weights, center, optimizer and counters agree to the last bit; 8 images of 44 a step:
    mid-epoch, and across one.
    """
    options = ["trainer.max_steps=9", f"loader.num_workers={workers}"]
    whole = train(tmp_path / "whole", *options)
    stop = "callbacks.stop={_target_: tiny.StopAt, step: 4}"
    with pytest.raises(UserError, match="run the same command to resume"):
        train(tmp_path / "parts", *options, stop)
    (interrupted,) = (tmp_path / "parts").iterdir()
    assert checkpoint(interrupted)["global_step"] == 4
    resumed = train(tmp_path / "parts", *options)
    assert resumed == interrupted
    a, b = checkpoint(whole), checkpoint(resumed)
    assert_same(a["state_dict"], b["state_dict"])
    assert_same(a["optimizer_states"], b["optimizer_states"])
    assert a["global_step"] == b["global_step"] == 9
    assert (whole / "metrics.csv").read_text().count("\n") == (
        resumed / "metrics.csv"
    ).read_text().count("\n")


@pytest.mark.slow
def test_number_of_workers_changes_nothing(tmp_path: Path) -> None:
    """The same request with other workers is the same run, to the last bit."""
    a = train(tmp_path / "a", "trainer.max_steps=3", "loader.num_workers=0")
    b = train(tmp_path / "b", "trainer.max_steps=3", "loader.num_workers=2")
    assert a.name == b.name
    assert_same(checkpoint(a)["state_dict"], checkpoint(b)["state_dict"])


def test_another_seed_gives_another_run(tmp_path: Path) -> None:
    """The seed reaches weights, order and crops."""
    a = train(tmp_path, "trainer.max_steps=2")
    b = train(tmp_path, "trainer.max_steps=2", "seed=1")
    assert a != b
    key = "method.student.backbone.blocks.0.attn.qkv.weight"
    assert not torch.equal(checkpoint(a)["state_dict"][key], checkpoint(b)["state_dict"][key])


def start(*arguments: str) -> subprocess.CompletedProcess[str]:
    """`dino-lite ARGUMENTS` in an interpreter of its own, which starts the other ranks itself."""
    line = [sys.executable, "-c", "from dino_lite.cli import main; main()", *arguments]
    return subprocess.run(line, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_processes_and_micro_batches_change_nothing_but_rounding(tmp_path: Path) -> None:
    """1x1, 1x4 and, through the command line, 2x1 and 2x2 (processes x micro-batches) agree in
    float64 without drop path, whether the command starts the second process or a launcher does.
    """
    options = [
        "trainer.precision=64",
        "backbone.drop_path=0.0",
        "trainer.max_steps=5",
        "~callbacks.online_eval",
    ]
    plain = [option for option in options if not option.startswith("~")] + [
        "callbacks.online_eval=null"
    ]
    whole = checkpoint(train(tmp_path / "1x1", *plain))
    (folder,) = (path for path in (tmp_path / "1x1").iterdir() if path.is_dir())
    logged = {"1x1": last_loss(folder)}
    others = {"1x4": checkpoint(train(tmp_path / "1x4", *plain, "trainer.micro_batch_size=2"))}
    for name, micro in (("2x1", 0), ("2x2", 2)):
        arguments = tiny_command(
            tmp_path / name, *options, "trainer.devices=2", f"trainer.micro_batch_size={micro}"
        )
        launched = start if name == "2x1" else partial(command, ranks=2)
        result = launched("pretrain", *arguments)
        assert result.returncode == 0, result.stderr[-3000:]
        (folder,) = (path for path in (tmp_path / name).iterdir() if path.is_dir())
        others[name] = checkpoint(folder)
        logged[name] = last_loss(folder)
    for name, other in others.items():
        assert other["global_step"] == 5, name
        assert_same(whole["state_dict"], other["state_dict"], name, tolerance=1e-9)
    for name, loss in logged.items():  # the mean over ranks, not rank 0's
        assert loss == pytest.approx(logged["1x1"], rel=1e-5), name


def last_loss(folder: Path) -> float:
    """The last loss in metrics.csv."""
    with open(folder / "metrics.csv") as file:
        return [float(row["loss"]) for row in csv.DictReader(file) if row["loss"]][-1]


@pytest.mark.slow
def test_timed_run_ends_on_time_and_its_schedules_with_it(tmp_path: Path) -> None:
    """max_time ends the run; the momentum has arrived at 1 and the rate at its end."""
    folder = train(
        tmp_path, "trainer.max_steps=null", "trainer.max_time=3s", "optim.freeze_last_layer=0.1"
    )
    results = json.loads((folder / "results.json").read_text())
    assert 3 <= results["train_seconds"] < 20
    with open(folder / "metrics.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["progress"]]
    assert float(rows[-1]["progress"]) > 0.8
    assert float(rows[-1]["momentum"]) > 0.999


def test_finished_run_says_so_and_trains_no_further(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same command on a finished run changes nothing."""
    before = (run / "checkpoints" / "last.ckpt").stat().st_mtime_ns
    run_pretrain(tiny(run.parent, "baselines=true", WITH_PICTURES))
    assert "is finished" in capsys.readouterr().out
    assert (run / "checkpoints" / "last.ckpt").stat().st_mtime_ns == before


def test_prolonging_a_run_is_refused_with_the_reason(tmp_path: Path) -> None:
    """Schedules depend on the length, so a named run cannot be given more steps."""
    train(tmp_path, "name=fixed", "trainer.max_steps=2")
    with pytest.raises(UserError, match="schedules depend on the length of a run"):
        train(tmp_path, "name=fixed", "trainer.max_steps=4")
    with pytest.raises(UserError, match=r"was started with optim\.clip=3"):
        train(tmp_path, "name=fixed", "trainer.max_steps=2", "optim.clip=1.0")


def test_changed_data_is_refused_on_resume(tmp_path: Path) -> None:
    """A run goes on only with the list of files it was started with."""
    data = photos(tmp_path / "photos", [f"{i}.png" for i in range(12)])
    options = [f"data.root={data}", "trainer.max_steps=3"]
    stop = "callbacks.stop={_target_: tiny.StopAt, step: 1}"
    with pytest.raises(UserError, match="interrupted"):
        train(tmp_path / "runs", *options, stop, data="folder")
    photos(data, ["one_more.png"])
    with pytest.raises(UserError, match="the data has changed"):
        train(tmp_path / "runs", *options, data="folder")


def test_damaged_checkpoint_is_a_sentence(tmp_path: Path) -> None:
    """A torn last.ckpt is named, with the way out."""
    stop = "callbacks.stop={_target_: tiny.StopAt, step: 2}"
    with pytest.raises(UserError, match="interrupted"):
        train(tmp_path, stop)
    (folder,) = tmp_path.iterdir()
    path = folder / "checkpoints" / "last.ckpt"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"last\.ckpt is damaged"):
        train(tmp_path)


def test_run_in_use_is_refused(tmp_path: Path) -> None:
    """Two processes cannot train one run."""
    fcntl = pytest.importorskip("fcntl")
    (tmp_path / "busy").mkdir()
    with open(tmp_path / "busy" / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process"):
            train(tmp_path, "name=busy")


def test_evaluate_and_export_know_the_runs_data(run: Path) -> None:
    """Both take the run alone; the exported backbone's tokens equal the teacher's, its k-NN too."""
    chosen = [f"checkpoint={run}", f"runs_dir={run.parent}"]
    measured = run_evaluate(compose("evaluate", chosen))
    written = run_export(compose("export", chosen))
    assert written["safetensors"]["largest_difference"] < 1e-6
    folder = written["safetensors"]["directory"]
    backbone = dino_lite.load_backbone(folder)
    assert backbone(torch.zeros(1, 3, 16, 16)).cls.shape == (1, 32)
    exported = run_evaluate(
        compose(
            "evaluate",
            [f"checkpoint={folder}", "data=shapes", "data.num_train=44", "data.num_test=20"],
        )
    )
    assert exported["knn"]["k"] == measured["knn"]["k"]
    results = json.loads((run / "results.json").read_text())
    assert results["last"]["knn"]["top1"] == measured["knn"]["top1"]
    run_evaluate(compose("evaluate", [f"checkpoint={run / 'checkpoints' / 'best.ckpt'}"]))
    assert {"last", "best"} <= json.loads((run / "results.json").read_text()).keys()


def test_run_starts_from_an_exported_backbone(run: Path, tmp_path: Path) -> None:
    """backbone.pretrained gives student and teacher the exported weights."""
    out = tmp_path / "export"
    run_export(put(compose("export", [f"checkpoint={run}"]), "out", str(out)))
    folder = train(
        tmp_path / "runs",
        f"backbone.pretrained={out}",
        "trainer.max_steps=1",
        "optim.learning_rate.warmup=0.5",
        "optim.freeze_last_layer=0.0",
    )
    weights, start = checkpoint(folder)["state_dict"], dino_lite.load_backbone(out).state_dict()
    for name, value in start.items():
        assert torch.allclose(
            weights[f"method.teachers.ema.module.backbone.{name}"], value, atol=1e-6
        ), name


def test_folder_without_labels_trains_and_has_no_best(tmp_path: Path) -> None:
    """Unlabeled photographs need nothing but their folder; odd names are fine."""
    data = photos(
        tmp_path / "my é=photos (1)", ["a b.png", "sub dir/ü.png", *[f"{i}.png" for i in range(10)]]
    )
    config = put(tiny(tmp_path / "runs", f"data.root='{data}'", data="auto"), "baselines", True)
    folder = Path(run_pretrain(config)["run"])
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["last.ckpt"]
    assert "knn_trained" not in json.loads((folder / "results.json").read_text())
