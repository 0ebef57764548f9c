"""A loss from outside the package: a module on PYTHONPATH and its YAML below --config-dir."""

from __future__ import annotations

import csv
import math
import sys
from pathlib import Path

import pytest

from dino_lite.commands.pretrain import main
from tiny import checkpoint, tiny_command

CODE = '''
"""Variance regularization (Bardes et al. 2022, arXiv 2105.04906, section 4.1) of embeddings."""

import torch

from dino_lite.contracts import Loss


class VarianceLoss(Loss):
    mixes_images = True

    def __init__(self, reads, weight, gamma):
        self.reads, self.weight, self.gamma = reads, weight, gamma

    def __call__(self, match):
        std = match.student.z.float().var(dim=1, correction=0).add(1e-4).sqrt()  # S E
        return torch.relu(self.gamma - std).mean()
'''
CONFIG = """
variance:
  _target_: outside_variance.VarianceLoss
  reads: embedding
  weight: {_target_: dino_lite.optim.schedules.Constant, value: 0.5}
  gamma: 1.0
"""


@pytest.fixture
def outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder for --config-dir; the module is importable."""
    (tmp_path / "outside_variance.py").write_text(CODE)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "conf" / "loss").mkdir(parents=True)
    (tmp_path / "conf" / "loss" / "variance.yaml").write_text(CONFIG)
    return tmp_path / "conf"


def pretrain(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    """`dino-lite pretrain ARGUMENTS` in this process."""
    monkeypatch.setattr(sys, "argv", ["dino-lite", *arguments])
    main()


@pytest.mark.slow
def test_a_run_trains_with_it_beside_the_methods_own(
    outside: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is part of the total, logged under its name, and its settings are overridden as others."""
    words = ["loss=[dino,variance]", "loss.variance.gamma=2.0", "name=run"]
    pretrain(monkeypatch, "--config-dir", str(outside), *tiny_command(tmp_path, *words))
    assert checkpoint(tmp_path / "run")["global_step"] == 8
    with open(tmp_path / "run" / "metrics.csv") as file:
        row = next(row for row in csv.DictReader(file) if row["loss"])
    loss, dino, variance = (float(row[name]) for name in ("loss", "dino", "variance"))
    assert math.isclose(loss, dino + 0.5 * variance, rel_tol=1e-4)
    assert 1.0 < variance < 2.0  # each std of a unit vector's coordinate is below 1


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--config-dir=CONF", "loss=[dino,variance]", "loss.variance.gama=1"], "variance.gamma?"),
        (["-cd", "CONF", "loss=[dino,varience]"], "did you mean variance?"),
        (["--config-dir", "CONF/nowhere", "loss=[dino]"], "CONF/nowhere: there is no such folder"),
    ],
)
def test_a_mistake_beside_it_is_one_sentence(
    flags: list[str],
    said: str,
    outside: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Suggestions know the keys and choices of --config-dir."""
    with pytest.raises(SystemExit) as ended:
        pretrain(monkeypatch, *(flag.replace("CONF", str(outside)) for flag in flags))
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said.replace("CONF", str(outside)) in line
