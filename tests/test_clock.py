"""What measures a run: steps, or seconds on a clock that survives a resume."""

from __future__ import annotations

import pytest
import torch

from dino_lite.contracts import Progress
from dino_lite.methods import clock
from dino_lite.methods.clock import Clock
from dino_lite.optim.schedules import Cosine

CPU = torch.device("cpu")


class Watch:
    """A clock whose hands the test moves."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        """What time.monotonic would say."""
        return self.now


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    """The clock module's time, held in a hand."""
    watch = Watch()
    monkeypatch.setattr(clock, "time", watch)
    return watch


def test_a_run_of_steps_stands_where_its_step_does() -> None:
    """The last of ten steps is the last, whatever the time."""
    steps = Clock(10, None, 4)
    steps.start()
    assert steps.at(3, CPU) == Progress(3, 10, 4)
    assert [steps.done(steps.at(i, CPU)) for i in (0, 8, 9, 10)] == [False, False, True, True]
    assert steps.at(9, CPU).epoch == 2


def test_a_run_of_one_step_is_done_at_once() -> None:
    """Step 0 is its last."""
    steps = Clock(1, None, 1)
    assert steps.done(steps.at(0, CPU))


def test_a_timed_run_stands_where_the_clock_does(watch: Watch) -> None:
    """Progress is seconds over budget, whatever the step, and ends exactly at the end."""
    timed = Clock(None, 60.0, 4)
    timed.start()
    found = []
    for seconds in (0, 15, 59.99999, 60, 90):
        watch.now = 1000.0 + seconds
        at = timed.at(7, CPU)
        found.append((at.fraction, at.epoch, timed.done(at)))
    assert [fraction for fraction, *_ in found] == pytest.approx(
        [0.0, 0.25, 59.99999 / 60, 1.0, 1.0]
    )
    assert [done for *_, done in found] == [False, False, False, True, True]
    assert Cosine(1.0, 0.125, warmup=0.1)(timed.at(7, CPU)) == 0.125


def test_seconds_survive_a_resume(watch: Watch) -> None:
    """A checkpoint at 20 of 60 seconds, resumed an hour later, has 40 left."""
    first = Clock(None, 60.0, 4)
    first.start()
    watch.now += 20
    first.at(0, CPU)
    saved = first.seconds
    watch.now += 3600
    second = Clock(None, 60.0, 4)
    second.seconds = saved
    second.start()
    assert second.at(0, CPU).fraction == pytest.approx(20 / 60)
    watch.now += 39
    assert not second.done(second.at(0, CPU))
    watch.now += 1
    assert second.done(second.at(0, CPU))


def test_seconds_are_counted_in_runs_of_steps_too(watch: Watch) -> None:
    """They are reported at the end, also after a resume."""
    steps = Clock(10, None, 4)
    steps.seconds = 5.0
    steps.start()
    watch.now += 7
    steps.at(0, CPU)
    assert steps.seconds == 12.0


def test_before_the_start_no_time_passes(watch: Watch) -> None:
    """What was restored stands until training begins."""
    timed = Clock(None, 60.0, 4)
    timed.seconds = 30.0
    watch.now += 100
    assert timed.at(0, CPU).fraction == 0.5


@pytest.mark.parametrize(("num_steps", "max_seconds"), [(None, None), (10, 60.0)])
def test_a_run_has_exactly_one_measure(num_steps: int | None, max_seconds: float | None) -> None:
    """Neither none nor both."""
    with pytest.raises(ValueError, match="exactly one"):
        Clock(num_steps, max_seconds, 4)
