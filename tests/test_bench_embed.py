"""The measurement of embedding runs."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_embedding_is_measured_beside_a_plain_loop(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Few images: every number is there, and both sides compute the same features."""
    spec = importlib.util.spec_from_file_location("b", ROOT / "scripts" / "bench_embed.py")
    assert spec is not None
    assert spec.loader is not None
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    out = tmp_path / "out.json"
    sizes = ["--most", "2", "--rounds", "1", "--workers", "0", "--model", "vit_tiny_patch16_224"]
    assert bench.main(["--json", str(out), *sizes]) == 0
    found = json.loads(out.read_text())
    assert min(found["ratio"], found["cpu_ratio"]) > 0
    assert found["images"] == 2
    assert found["largest_difference"] < 1e-4
    assert "ratio" in capsys.readouterr().out
