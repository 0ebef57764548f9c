"""What a run says it takes: measured by its own first steps."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from dino_lite import pretrain
from dino_lite.callbacks.estimate import Measured, peak_memory
from dino_lite.methods import clock
from test_pretrain import command
from tiny import tiny_command, train

MEASURED = Measured(
    device="NVIDIA H200",
    num_devices=1,
    timed=False,
    steps=12_500,
    epochs=100.0,
    seconds=31 * 3600.0,
    images_per_second=412.3,
    data_wait=0.021,
    memory=11 * 2**30,
    inactive=[],
    measured_at=(20, 31.0),
)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """One step of warm-up and two measured ones, however short they are."""
    monkeypatch.setattr(clock, "_WARM_UP", (1, 1, 0.0))
    monkeypatch.setattr(clock, "_MEASURED", (2, 0.0))


def lines(out: str) -> list[str]:
    return [line for line in out.splitlines() if line.startswith("estimate: ")]


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (
            {},
            "estimate: 100 epochs, 12,500 steps take 31 h at 410 images/s, 2 % of the time waiting "
            "for data, 11 GiB of memory on NVIDIA H200",
        ),
        (
            {"timed": True, "steps": 1, "epochs": 0.05, "seconds": 90.0, "num_devices": 8},
            "estimate: 90 s are 1 step, 0.05 epochs at 410 images/s, 2 % of the time waiting for "
            "data, 11 GiB of memory each on 8 × NVIDIA H200",
        ),
        (
            {"inactive": ["gram"], "memory": None},
            "estimate: 100 epochs, 12,500 steps take at least 31 h at 410 images/s, 2 % of the "
            "time waiting for data, not active yet: loss.gram",
        ),
        ({"inactive": ["gram"], "timed": True, "seconds": 1.2e6}, "14 days are at most 12,500 st"),
        ({"epochs": 1.0, "steps": 2, "seconds": 9e6}, "estimate: 1 epoch, 2 steps take 100 days"),
    ],
)
def test_the_line_reads_well(changes: dict[str, Any], line: str) -> None:
    """Units of their size, two digits, no plural of one, and a bound where a loss begins later."""
    assert line in MEASURED._replace(**changes).line()


def test_a_run_prints_one_line_and_keeps_the_numbers(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """They are those of the run; the time that is left follows from them."""
    run = train(tmp_path, "callbacks.progress.line_seconds=0.0")
    out = capfd.readouterr().out
    (line,) = lines(out)
    kept = json.loads((run / "results.json").read_text())["estimate"]
    assert Measured(**kept).line() == line
    assert (kept["steps"], kept["timed"], kept["inactive"]) == (8, False, [])
    assert kept["epochs"] == pytest.approx(8 * 8 / 44)
    assert kept["measured_at"][0] == 3
    assert kept["seconds"] > kept["measured_at"][1] > 0
    assert 0 <= kept["data_wait"] <= 1
    # That of this process; the kernel's counter is exact to some pages.
    assert 10**8 < kept["memory"] <= 1.01 * (peak_memory(torch.device("cpu")) or 0)
    left = [line.rpartition(" · ")[2] for line in out.splitlines() if " · " in line]
    assert left[0] == "measuring"
    assert re.fullmatch(r"\d+ (s|min .*) left", left[4])


@pytest.mark.slow
def test_a_timed_run_has_no_more_time_left_than_its_budget(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """From its first step on, whatever is not measured yet."""
    timed = ("trainer.max_steps=null", "trainer.max_time=3s", "optim.freeze_last_layer=0.1")
    run = train(tmp_path, *timed, "callbacks.progress.line_seconds=0.0")
    out = capfd.readouterr().out
    left = [int(seconds) for seconds in re.findall(r"· (\d+) s left", out)]
    assert left[0] <= 3
    assert left == sorted(left, reverse=True)
    assert "measuring" not in out
    assert lines(out)[0].startswith("estimate: 3 s are ")
    kept = json.loads((run / "results.json").read_text())["estimate"]
    assert kept["timed"]
    assert kept["steps"] > 3


@pytest.mark.slow
def test_a_loss_that_begins_later_makes_it_a_bound(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Gram anchoring takes time from its start on."""
    pretrain(*tiny_command(tmp_path, "method=dinov3", "method.gram.start_step=7 steps"))
    (line,) = lines(capfd.readouterr().out)
    assert "take at least" in line
    assert line.endswith("not active yet: loss.gram")


def test_a_run_without_the_observer_says_nothing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Its time left is measured all the same."""
    run = train(tmp_path, "callbacks.estimate=null", "callbacks.progress.line_seconds=0.0")
    out = capfd.readouterr().out
    assert not lines(out)
    assert re.search(r"· \d+ (s|min .*) left", out)
    assert "estimate" not in json.loads((run / "results.json").read_text())


@pytest.mark.slow
def test_several_processes_print_one_line(tmp_path: Path) -> None:
    """Images are those of all of them."""
    timed = ["trainer.max_steps=null", "trainer.max_time=6s", "optim.freeze_last_layer=0.1"]
    result = command("pretrain", *tiny_command(tmp_path, *timed, "trainer.devices=2"), ranks=2)
    assert result.returncode == 0, result.stderr[-3000:]
    (line,) = lines(result.stdout)
    assert line.endswith(" of memory each on 2 × cpu")
