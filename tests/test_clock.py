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


def steps_of(clock: Clock, watch: Watch, *durations: float, first: int = 0) -> list[float | None]:
    """What is left after each of so many steps of these seconds."""
    left = []
    for step, duration in enumerate(durations, first):
        clock.at(step, CPU)
        watch.now += duration
        left.append(clock.seconds_left(step + 1))
    return left


def test_time_left_is_measured_after_a_warm_up(watch: Watch) -> None:
    """Ten steps that may compile or come from the loader's stock do not count; ten are measured,
    and then all that follow.
    """
    steps = Clock(100, None, 4)
    steps.start()
    left = steps_of(steps, watch, 60.0, *[0.1] * 9, *[1.0] * 10, 1.0, 3.0, 1.0)
    assert left[:20] == [None] * 20
    assert steps.warm_since == (10, pytest.approx(60.9))
    assert left[20:] == pytest.approx([79.0, 78.0, 77 * 14 / 12])


def test_quick_steps_are_measured_for_two_seconds_and_slow_ones_for_three_steps(
    watch: Watch,
) -> None:
    """Neither too few to tell nor minutes of waiting; a resumed run measures anew."""
    quick, slow = Clock(10_000, None, 4), Clock(100, None, 4)
    quick.start()
    left = steps_of(quick, watch, *[0.01] * 215, first=500)
    assert left.index(None, 200) == 200
    assert left[-1] == pytest.approx(0.01 * (10_000 - 715))
    slow.start()
    left = steps_of(slow, watch, *[8.0] * 8)
    assert left[:6] == [None] * 6
    assert left[6:] == pytest.approx([8 * 93, 8 * 92])


def test_a_timed_run_has_its_budget_left(watch: Watch) -> None:
    """Measured or not, and never less than nothing."""
    timed = Clock(None, 60.0, 4)
    timed.start()
    timed.at(0, CPU)
    assert timed.seconds_left(1) == 60.0
    watch.now += 15
    timed.at(1, CPU)
    assert timed.seconds_left(2) == 45.0
    watch.now += 50
    timed.at(2, CPU)
    assert timed.seconds_left(3) == 0.0


@pytest.mark.parametrize(
    ("trainer", "expected"),
    [
        ({"max_steps": 7}, (7, None, 0.56)),
        ({"max_epochs": 10}, (125, None, 10.0)),
        ({"max_epochs": 0.001}, (1, None, 0.08)),
        ({"max_time": "90s"}, (None, 90.0, None)),
    ],
)
def test_the_length_is_read_of_the_settings(
    trainer: dict[str, object], expected: tuple[object, ...]
) -> None:
    """Steps, budget in seconds and epochs: 50 images in steps of 4."""
    usual = {"max_steps": None, "max_epochs": None, "max_time": None}
    run = Clock.of(usual | trainer, 50, 4)
    assert (run.num_steps, run.max_seconds, run.num_epochs) == expected
    assert run.steps_per_epoch == 12.5


@pytest.mark.parametrize(("num_steps", "max_seconds"), [(None, None), (10, 60.0)])
def test_a_run_has_exactly_one_measure(num_steps: int | None, max_seconds: float | None) -> None:
    """Neither none nor both."""
    with pytest.raises(ValueError, match="exactly one"):
        Clock(num_steps, max_seconds, 4)
