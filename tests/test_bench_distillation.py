"""The arithmetic of the distillation's bar."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


@pytest.fixture
def bench(root: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script, as a module; scripts import each other by name."""
    monkeypatch.syspath_prepend(root / "scripts")
    return importlib.import_module("bench_distillation")


def parts(data: str, distilled: tuple[float, ...], raw: float = 40.0) -> dict[str, dict[str, Any]]:
    """A teacher that gains 10 points, and students of two seeds beside DINO at 45."""
    found = {f"{data}/teacher": {"trained": 50.0, "untrained": 40.0, "raw_pixels": raw}}
    for seed, value in enumerate(distilled):
        found[f"{data}/{seed}/distilled"] = {"trained": value, "untrained": 38.0 + seed}
        found[f"{data}/{seed}/dino_equal_steps"] = {"trained": 45.0}
        found[f"{data}/{seed}/dino_equal_seconds"] = {"trained": 45.0 - seed}
    return found


def test_each_key_is_the_mean_over_seeds_of_the_worse_data_set(bench: ModuleType) -> None:
    """Gains are over each network's own untrained weights, and the floor is the better baseline."""
    found = bench.summary(parts("a", (48.0, 50.0)) | parts("b", (46.0, 46.0), raw=30.0), 2)
    assert found["data"]["a"]["minus_dino_equal_steps"] == 4.0  # (3 + 5)/2
    assert found["data"]["a"]["minus_dino_equal_steps_spread"] == 2.0
    assert found["data"]["a"]["minus_floor"] == 9.0  # raw pixels, 40, are the better
    assert found["data"]["b"]["minus_floor"] == 7.5  # untrained: 38, then 39
    assert found["data"]["b"]["gain_kept"] == 0.75  # (8/10 + 7/10)/2
    assert found["minus_dino_equal_steps"] == 1.0  # of b
    assert found["minus_dino_equal_seconds"] == 1.5  # (1 + 2)/2
    assert found["gain_kept"] == 0.75
    assert found["gain_kept_spread"] == 0.1
    assert found["met"]


@pytest.mark.parametrize(
    ("distilled", "raw"),
    [
        ((45.0, 45.0), 40.0),  # no better than DINO in as many steps
        ((45.6, 45.2), 40.0),  # 69 % of the teacher's gain
        ((46.0, 46.0), 43.5),  # 2.5 points above raw pixels
    ],
)
def test_the_bar_is_missed_by_any_of_its_parts(
    bench: ModuleType, distilled: tuple[float, ...], raw: float
) -> None:
    """The other data set passes."""
    passes = parts("a", (48.0, 50.0))
    assert not bench.summary(passes | parts("b", distilled, raw), 2)["met"]


def test_every_comparison_follows_its_distillation(bench: ModuleType, tmp_path: Path) -> None:
    """Names of parts that the arithmetic reads are those of trainings; equal seconds are those
    that the distillation took, and all seconds the teacher's besides.
    """
    done = {t.name: {"seconds": 100.0} for t in bench.teachers(tmp_path)}
    done |= {t.name: {"seconds": 7.5} for t in bench.distillations(tmp_path, 2, True)}
    asked = {t.name: t.settings for t in bench.comparisons(tmp_path, 2, done)}
    assert "trainer.max_time=7.5s" in asked["cifar10/1/dino_equal_seconds"]
    assert "trainer.max_time=107.5s" in asked["cifar10/0/dino_all_seconds"]
    names = {*done, *asked}
    for data in bench.DATA:
        assert {name for name in parts(data, (0.0, 0.0))} <= names
