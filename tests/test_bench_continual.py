"""The arithmetic of the continual bar."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture
def bench(root: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script, as a module; scripts import each other by name."""
    monkeypatch.syspath_prepend(root / "scripts")
    return importlib.import_module("bench_continual")


def parts(**arms: list[tuple[float, float]]) -> dict[str, dict[str, float]]:
    """Starts at 40 and 50 % of two seeds, and arms that forget and gain as given."""
    found = {f"{seed}/start": {"old": 40.0, "new": 50.0} for seed in range(2)}
    for arm, changes in arms.items():
        for seed, (forgets, gains) in enumerate(changes):
            name = f"{seed}/{arm.replace('plain_0', 'plain_0.')}"
            found[name] = {"old": 40 - forgets, "new": 50 + gains}
    return found


def test_the_gated_arm_is_compared_with_the_plain_rate_that_gains_most(bench: ModuleType) -> None:
    """Means over seeds; the spread of a ratio is that of its seeds' own ratios."""
    found = bench.summary(
        parts(
            plain_1=[(9.0, 6.0), (9.0, 8.0)],
            plain_03=[(6.0, 9.0), (10.0, 11.0)],
            plain_01=[(1.0, 2.0), (1.0, 2.0)],
            gated=[(3.0, 9.0), (1.0, 8.8)],
        ),
        2,
    )
    assert found["plain"] == "plain_0.3"
    assert (found["plain_forgetting"], found["plain_forgetting_spread"]) == (8.0, 4.0)
    assert (found["plain_gain"], found["plain_gain_spread"]) == (10.0, 2.0)
    assert (found["forgetting_ratio"], found["forgetting_ratio_spread"]) == (0.25, 0.4)
    assert (found["gain_ratio"], found["gain_ratio_spread"]) == (0.89, 0.2)
    assert found["met"]


@pytest.mark.parametrize(
    ("plain", "gated"),
    [
        ((4.9, 10.0), (0.0, 10.0)),  # plain training forgets too little to compare
        ((9.0, 4.9), (0.0, 4.9)),  # and gains too little
        ((9.0, 10.0), (3.1, 10.0)),  # more than a third is forgotten
        ((9.0, 10.0), (3.0, 7.9)),  # less than 80 % is gained
        ((-1.0, 10.0), (-2.0, 10.0)),  # nothing is forgotten: there is no ratio
    ],
)
def test_the_bar_is_missed_by_any_of_its_parts(
    bench: ModuleType, plain: tuple[float, float], gated: tuple[float, float]
) -> None:
    """Each case misses one, in both seeds."""
    assert not bench.summary(parts(plain_1=[plain] * 2, gated=[gated] * 2), 2)["met"]


def test_an_arm_without_all_seeds_is_left_out(bench: ModuleType) -> None:
    """A run with --apart that was stopped is no worse than one without."""
    one = parts(plain_1=[(9.0, 10.0)] * 2, gated=[(3.0, 8.0)] * 2, replay=[(0.0, 1.0)])
    assert set(bench.summary(one, 2)["arms"]) == {"plain_1", "gated"}


def test_every_arm_starts_from_its_seeds_own_start(bench: ModuleType, tmp_path: Path) -> None:
    """With as many steps and the same settings but its own; only those reported apart see OLD."""
    asked = {task.name: task for task in bench.tasks(tmp_path, 2, "shapes", True)}
    starts = [name for name, task in asked.items() if task.needs is None]
    assert starts == ["0/start", "1/start"]
    for name, task in asked.items():
        if name not in starts:
            seed = name[0]
            assert task.needs == f"{seed}/start"
            assert f"checkpoint={tmp_path / 'runs' / seed / 'start'}" in task.settings
            assert f"trainer.max_steps={bench.STEPS['arm']}" in task.settings
            sees_old = any(word.startswith("keep.root=") for word in task.settings)
            assert sees_old == name.endswith(("/promise", "/replay"))
