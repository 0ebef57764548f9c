"""The bench of the k-NN compares like with like, and says what it measured."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from ranks import SERVER


@pytest.fixture(autouse=True)
def scripts(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scripts import each other by name; the sides are forked, not started anew."""
    monkeypatch.syspath_prepend(root / "scripts")
    import step_process

    forking = SimpleNamespace(get_context=lambda method: SERVER)
    monkeypatch.setattr(step_process, "multiprocessing", forking)


@pytest.mark.parametrize("each_k", [False, True])
def test_both_sides_find_the_same(each_k: bool) -> None:
    """Accuracies between nothing and all, the same from one search and from four."""
    from bench_knn import KS, Sizes, clustered, ours, reference, same

    bank, queries = clustered(Sizes(600, 200, 32, 12))
    found = ours(bank, queries)
    assert list(found) == list(KS)
    assert all(10 < top1 < 99 and top1 < top5 for top1, top5 in found.values())
    assert same(reference(bank, queries, each_k), found)
    assert not same(found, found | {KS[0]: (0.0, 0.0)})


def test_the_bench_measures_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two processes in turns; ratios, memory and accuracies of both are in the file."""
    from bench_knn import Sizes, main

    file = tmp_path / "knn.json"
    assert main(["--rounds", "2", "--json", str(file)], Sizes(600, 200, 32, 12)) == 0
    found = json.loads(file.read_text())
    assert found["speed_ratio_min"] <= found["speed_ratio"] <= found["speed_ratio_max"]
    assert found["equal"]
    assert found["accuracy"]["ours"] == found["accuracy"]["reference"]
    assert set(found["memory_bytes"]) == {"ours", "reference"}
    assert "times as fast" in capsys.readouterr().out


def test_a_side_that_fails_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    """One sentence, exit code 2."""
    from bench_knn import Sizes, main

    assert main(["--rounds", "1"], Sizes(600, 50, 32, 12)) == 2
    assert "reference" in capsys.readouterr().err
