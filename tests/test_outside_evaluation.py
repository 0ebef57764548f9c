"""An evaluation from outside the package: a module on PYTHONPATH and its YAML by --config-dir."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from dino_lite.commands.evaluate import main
from tiny import train

CODE = '''
"""Norm of class features, with a picture that is a text file."""

from dino_lite.contracts import Evaluation
from dino_lite.eval.results import result


class FeatureNorm(Evaluation):
    num_blocks = 2

    def __init__(self, scale: float = 1.0):
        self.scale = scale

    def __call__(self, backbone, store):
        cls = store.pooled(backbone, store.data.splits.train).cls  # n blocks D
        norms = self.scale * cls[:, -1].norm(dim=1)
        return result(
            "norm", float(norms.mean()), protocol="mean norm", settings={"scale": self.scale},
            num_train=len(norms), num_test=0, scores=norms, unit="",
        )

    def draw(self, backbone, store, path):
        path.write_text(str(self.scale))


class NoEvaluation:
    pass
'''


@pytest.fixture
def outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder for --config-dir; the module is importable."""
    (tmp_path / "outside_norm.py").write_text(CODE)
    monkeypatch.syspath_prepend(tmp_path)
    folder = tmp_path / "conf" / "eval"
    folder.mkdir(parents=True)
    (folder / "norm.yaml").write_text("norm:\n  _target_: outside_norm.FeatureNorm\n  scale: 2.0\n")
    (folder / "none.yaml").write_text("none:\n  _target_: outside_norm.NoEvaluation\n")
    return tmp_path / "conf"


def evaluate(monkeypatch: pytest.MonkeyPatch, conf: Path, *words: str) -> None:
    """`dino-lite evaluate` in this process."""
    line = ["dino-lite", "--config-dir", str(conf), "accelerator=cpu", *words]
    monkeypatch.setattr(sys, "argv", line)
    main()


@pytest.mark.slow
def test_it_is_measured_with_baselines_beside_ours(
    outside: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its blocks are extracted, its result kept, its picture drawn, its keys overridden."""
    run = train(tmp_path / "runs", "trainer.max_steps=2")
    words = [f"checkpoint={run}", f"runs_dir={tmp_path / 'runs'}", "eval=[knn,norm]"]
    pictures = tmp_path / "pictures"
    evaluate(monkeypatch, outside, *words, "baselines=true", f"pictures={pictures}")
    first = json.loads((run / "results.json").read_text())["last"]
    assert first.keys() >= {"knn", "norm"}
    assert first["norm"]["baselines"].keys() == {"raw pixels", "untrained"}
    assert (pictures / "norm.png").read_text() == "2.0"
    evaluate(monkeypatch, outside, *words, "eval.norm.scale=1.0")
    second = json.loads((run / "results.json").read_text())["last"]
    assert second["norm"]["value"] == pytest.approx(first["norm"]["value"] / 2)


def test_what_is_no_evaluation_is_refused_in_a_sentence(
    outside: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Before anything is opened."""
    with pytest.raises(SystemExit) as ended:
        evaluate(monkeypatch, outside, f"checkpoint={tmp_path}", "eval=[none]")
    assert ended.value.code == 2
    assert "must derive from dino_lite.contracts.Evaluation" in capsys.readouterr().err
