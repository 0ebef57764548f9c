"""The scaling study varies one thing at a time, and survives a point that does not fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(autouse=True)
def scripts(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scripts import each other by name."""
    monkeypatch.syspath_prepend(root / "scripts")


class FakeSide:
    """Takes a second an image; has no room for 32 pixels."""

    def __init__(self, label: str, setup: Any, precision: str) -> None:
        self.setup = setup

    def wait(self) -> None:
        from step_process import SideError

        if self.setup.global_size == 32:
            raise SideError("out of memory")

    def step(self, number: int) -> tuple[float, float]:
        """The first steps compile."""
        return float(self.setup.batch_size) * (100 if number < 2 else 1), 0.0

    def memory(self) -> int:
        return 2**20 * self.setup.num_prototypes

    def __enter__(self) -> FakeSide:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing to end."""


def test_a_study_writes_tables_numbers_and_four_plots(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Warm-up does not count, and a point that fails says why beside those that did not."""
    import measure_scaling

    monkeypatch.setattr(measure_scaling, "Side", FakeSide)
    file = tmp_path / "scaling.json"
    command = ["--quick", "--rounds", "2", "--json", str(file), "--plots", str(tmp_path / "plots")]
    assert measure_scaling.main(command) == 1
    sweeps = json.loads(file.read_text())["sweeps"]
    assert [point["seconds"] for point in sweeps["batch_size"]] == [4.0, 16.0]
    assert [point["memory_bytes"] >> 20 for point in sweeps["num_prototypes"]] == [32, 1024]
    small, large = sweeps["global_size"]
    assert "error" not in small
    assert large["error"] == "out of memory"
    plots = sorted(path.name for path in (tmp_path / "plots").iterdir())
    assert plots == sorted(f"scaling_{field}.png" for field in sweeps)
    assert "| 16 | 16,000 | 1.0 | 32 |" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["CPU", "GPU", "QUICK"])
def test_every_point_can_be_built(name: str) -> None:
    """Crops divide into patches, and only the varied field and what hangs on it change."""
    import measure_scaling
    from step_process import planned

    study = getattr(measure_scaling, name)
    assert [sweep.field for sweep in study.sweeps] == [
        "batch_size",
        "num_prototypes",
        "num_local",
        "global_size",
    ]
    for sweep in study.sweeps:
        assert getattr(study.base, sweep.field) in sweep.values
        for value in sweep.values:
            setup = measure_scaling.varied(study.base, sweep.field, value)
            changed = {f for f in setup._fields if getattr(setup, f) != getattr(study.base, f)}
            assert changed - {"name"} <= {sweep.field, "local_size"}
            assert setup.global_size % setup.patch_size == setup.local_size % setup.patch_size == 0
            assert setup.local_size < setup.global_size
    config, _, _ = planned(
        measure_scaling.varied(study.base, "global_size", study.sweeps[3].values[-1])
    )
    assert config["augment"]["global_size"] == study.sweeps[3].values[-1]
