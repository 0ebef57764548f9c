"""Every method of conf/method end to end: trains, resumes to the bit; two processes."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import pytest

from dino_lite.config import Config, compose, config_dir
from dino_lite.contracts import UserError
from dino_lite.runs.checkpoint import find_checkpoint, open_backbone
from dino_lite.runs.pretraining import run_pretrain
from ranks import command
from test_pretrain import assert_same
from tiny import checkpoint, tiny_command

pytestmark = pytest.mark.slow

METHODS = sorted(path.stem for path in (config_dir() / "method").glob("*.yaml"))
METHODS.remove("distill")  # needs a teacher: test_distill.py
# Beside the tiny run's: no prototypes where a method has none, and Gram anchoring from half on.
WITH = {
    "simdino": ["method.head.num_prototypes=0"],
    "simdinov2": ["method.head.num_prototypes=0"],
    "dinov3": ["method.gram.start_step=0.5", "augment.gram_size=24"],
}
TERMS = {
    "dino": {"dino"},
    "dinov2": {"dino", "ibot", "koleo"},
    "dinov3": {"dino", "ibot", "koleo", "gram"},
    "simdino": {"simdino"},
    "simdinov2": {"simdino", "patch"},
}


def asked(runs_dir: Path, method: str, *overrides: str) -> Config:
    """A tiny run of it, patches of 4 pixels."""
    words = [f"method={method}", *WITH.get(method, []), "backbone.patch_size=4"]
    return compose("pretrain", tiny_command(runs_dir, *words, *overrides))


def test_no_method_is_forgotten() -> None:
    """A new one comes with its losses' names."""
    assert set(METHODS) == set(TERMS)


@pytest.mark.parametrize("method", METHODS)
def test_a_run_is_bit_equal_to_one_that_was_interrupted(method: str, tmp_path: Path) -> None:
    """Weights, teachers, centers, moments; its losses are logged, and its teacher is a backbone."""
    stop = "+callbacks.stop={_target_: tiny.StopAt, step: 5}"
    with pytest.raises(UserError, match="run the same command to resume"):
        run_pretrain(asked(tmp_path / "parts", method, stop))
    resumed = Path(run_pretrain(asked(tmp_path / "parts", method))["run"])
    whole = Path(run_pretrain(asked(tmp_path / "whole", method, "baselines=true"))["run"])
    assert whole.name == resumed.name
    assert whole.name.startswith(f"{method}_shapes_")
    a, b = checkpoint(whole), checkpoint(resumed)
    assert a["global_step"] == b["global_step"] == 8
    assert_same(a["state_dict"], b["state_dict"])
    assert_same(a["optimizer_states"], b["optimizer_states"])
    with open(whole / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert TERMS[method] <= set(rows[0])
    assert all(math.isfinite(float(value)) for row in rows for value in row.values() if value)
    backbone = open_backbone(find_checkpoint(str(whole), "runs")).backbone
    assert backbone.patch_size == 4


@pytest.mark.parametrize("method", ["dinov2", "dinov3"])
def test_two_processes_train_it_by_the_command_line(method: str, tmp_path: Path) -> None:
    """Every weight has a gradient at every step, and ranks stay together."""
    options = ["trainer.devices=2", "callbacks.pictures=null", "loss.koleo.across_ranks=true"]
    words = [f"method={method}", *WITH.get(method, []), "backbone.patch_size=4", *options]
    result = command("pretrain", *tiny_command(tmp_path, *words, "trainer.max_steps=6"), ranks=2)
    assert result.returncode == 0, result.stderr[-3000:]
    (run,) = (path for path in tmp_path.iterdir() if path.is_dir())
    assert checkpoint(run)["global_step"] == 6


def test_a_convolutional_network_learns_without_masks(tmp_path: Path) -> None:
    """DINOv2 on it is DINO with KoLeo; with masks it is refused in a sentence."""
    words = ["data=shapes", "backbone=convnet", "method=dinov2", "trainer.max_steps=2"]
    words += ["trainer.max_time=null", f"runs_dir={tmp_path}", "baselines=false"]
    words += ["data.num_train=20", "data.num_test=10", "loader.batch_size=4"]
    with pytest.raises(UserError, match="no mask token"):
        run_pretrain(compose("pretrain", words))
    results = run_pretrain(compose("pretrain", [*words, "method.masking=null", "~loss.ibot"]))
    assert results["finished"]
