"""The measurement of the linear probe runs."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def test_the_grid_is_measured_beside_one_head(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Tiny sizes: every number is there."""
    spec = importlib.util.spec_from_file_location("b", ROOT / "scripts" / "bench_linear.py")
    assert spec is not None
    assert spec.loader is not None
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    out = tmp_path / "out.json"
    sizes = ["--dim", "4", "--classes", "3", "--batch", "8", "--rounds", "1"]
    assert bench.main(["--json", str(out), *sizes]) == 0
    found = json.loads(out.read_text())
    assert found["heads"] == 52
    assert min(found["ratio"], found["ratio_mean"], found["speed_up"]) > 0
    assert set(found["seconds"]) == {"grid", "one", "one_mean", "modules"}
    assert "ratio" in capsys.readouterr().out
