"""Rates over the run: the reference's numbers, our own ends, spans, short and timed runs."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

import oracle
from dino_lite.contracts import Progress, Schedule, UserError
from dino_lite.optim.schedules import (
    Constant,
    Cosine,
    Warmup,
    scale_rate,
    span_steps,
)


def curve(schedule: Schedule, total: int, steps_per_epoch: float = 1) -> list[float]:
    """The schedule at every step of a run."""
    return [schedule(Progress(step, total, steps_per_epoch)) for step in range(total)]


# Numbers of the official code, computed by running it: 100 epochs of 1251 steps (DINO), 125,000
# steps (DINOv2).
EPOCH, DINO_STEPS, DINOV2_STEPS = 1251, 125_100, 125_000
DINOV2_RATE = 5.656854249492381e-03
REFERENCE = {
    "dino rate": (
        Cosine(1e-3, 1e-6, warmup="10 epochs", end_reached=False),
        DINO_STEPS,
        {
            0: 0.0,
            1: 7.994244144216164e-08,
            12_509: 1e-3,
            12_510: 1e-3,
            12_511: 9.99999999805551e-04,
            62_550: 5.872372647446319e-04,
            125_099: 1.0000001944489353e-06,
        },
    ),
    "dino weight decay": (
        Cosine(0.04, 0.4, end_reached=False),
        DINO_STEPS,
        {0: 0.04, 62_550: 0.22, 125_099: 0.3999999999432419},
    ),
    "dino momentum": (
        Cosine(0.996, 1.0, end_reached=False),
        DINO_STEPS,
        {0: 0.996, 62_550: 0.998, 125_099: 0.9999999999993694},
    ),
    "dinov2 rate": (
        Cosine(DINOV2_RATE, 1e-6, warmup="12500 steps", end_reached=False),
        DINOV2_STEPS,
        {
            0: 0.0,
            1: 4.5258454672312835e-07,
            12_499: DINOV2_RATE,
            12_500: DINOV2_RATE,
            62_500: 3.319991516533249e-03,
            124_999: 1.0000011026379877e-06,
            125_000: 1e-6,
        },
    ),
    "dinov2 temperature": (
        Warmup(0.04, 0.07, "37500 steps"),
        DINOV2_STEPS,
        {0: 0.04, 18_750: 0.05500040001066696, 37_499: 0.07, 37_500: 0.07},
    ),
    "dino temperature": (
        Warmup(0.04, 0.07, "30 epochs", per="epoch"),
        DINO_STEPS,
        {
            0: 0.04,
            EPOCH - 1: 0.04,
            EPOCH: 0.04 + 0.03 / 29,
            29 * EPOCH: 0.07,
            30 * EPOCH: 0.07,
            DINO_STEPS - 1: 0.07,
        },
    ),
}


@pytest.mark.parametrize("name", REFERENCE)
def test_the_references_numbers_come_out_to_twelve_digits(name: str) -> None:
    """Selected steps of the official schedules equal what the official code computes."""
    schedule, total, wanted = REFERENCE[name]
    for step, value in wanted.items():
        assert schedule(Progress(step, total, EPOCH)) == pytest.approx(value, rel=1e-12, abs=1e-15)


@given(
    base=st.floats(1e-5, 1.0),
    end=st.floats(0.0, 1.0),
    start=st.floats(0.0, 1e-3),
    warmup=st.integers(0, 30),
    rest=st.integers(1, 60),
)
def test_a_reference_cosine_is_its_array(
    base: float, end: float, start: float, warmup: int, rest: int
) -> None:
    """At every step of any run the value is the official array's."""
    total = warmup + rest
    schedule = Cosine(base, end, start, f"{warmup} steps", end_reached=False)
    wanted = oracle.cosine_schedule(base, end, total, warmup, start)
    assert curve(schedule, total) == pytest.approx(wanted, rel=1e-12, abs=1e-15)


@pytest.mark.parametrize("warmup", [0, 1, 2, 6])
def test_a_temperature_per_epoch_is_the_references_array(warmup: int) -> None:
    """Six epochs of five steps hold each epoch's official value."""
    schedule = Warmup(0.04, 0.07, f"{warmup} epochs", per="epoch")
    wanted = oracle.temperature_schedule(0.04, 0.07, warmup, 6)
    assert curve(schedule, 30, 5) == pytest.approx([v for v in wanted for _ in range(5)], rel=1e-12)


@given(warmup=st.integers(0, 30), rest=st.integers(0, 30), start=st.floats(0, 0.1))
def test_a_temperature_per_step_is_a_line_then_level(warmup: int, rest: int, start: float) -> None:
    """Both ends of the warm-up are included, as DINOv2 has it."""
    assume(warmup + rest > 0)
    wanted = oracle.temperature_schedule(start, 0.07, warmup, warmup + rest)
    schedule = Warmup(start, 0.07, f"{warmup} steps")
    assert curve(schedule, warmup + rest) == pytest.approx(wanted, rel=1e-12, abs=1e-15)


@given(
    base=st.floats(1e-5, 1.0),
    end=st.floats(0.0, 2.0),
    warmup=st.integers(0, 40),
    rest=st.integers(2, 60),
)
def test_our_cosine_has_base_once_and_ends_at_its_end(
    base: float, end: float, warmup: int, rest: int
) -> None:
    """The warm-up rises to base, which comes once; the last step has exactly the end value."""
    assume(abs(base - end) > 1e-3)
    total = warmup + rest
    values = curve(Cosine(base, end, warmup=f"{warmup} steps"), total)
    assert values[-1] == end
    assert [i for i, v in enumerate(values) if math.isclose(v, base, rel_tol=1e-9)] == [warmup]
    warm, cosine = values[: warmup + 1], values[warmup:]
    assert all(a < b for a, b in pairwise(warm))
    sign = math.copysign(1.0, end - base)
    assert all(sign * (b - a) > 0 for a, b in pairwise(cosine))
    assert warm[0] == (pytest.approx(base) if warmup == 0 else 0.0)


def test_our_warmup_takes_equal_strides() -> None:
    """Step i of w has start + (base − start)·i/w."""
    values = curve(Cosine(1.0, 0.0, start=0.2, warmup="4 steps"), 10)
    assert values[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])


def test_one_step_of_a_run_has_the_end_value() -> None:
    """A run of a single step is its own last step."""
    assert Cosine(1.0, 0.25)(Progress(0, 1, 1)) == 0.25


def test_a_constant_never_moves() -> None:
    """The same value at both ends of a run."""
    assert set(curve(Constant(3), 7)) == {3.0}


@pytest.mark.parametrize(
    ("span", "steps"),
    [
        (0.0, 0),
        (0.1, 100),
        (1, 1000),
        ("10 epochs", 200),
        ("1 epoch", 20),
        ("2.5ep", 50),
        ("500 steps", 500),
        ("1 step", 1),
        (" 7 ST ", 7),
        ("1e2 steps", 100),
        ("0 steps", 0),
    ],
)
def test_spans_of_every_unit_are_understood(span: float | str, steps: int) -> None:
    """Fractions, epochs and steps of a run of 1000 steps, 20 an epoch."""
    assert Cosine(1.0, 0.0, warmup=span).warmup == span
    assert span_steps(span, Progress(0, 1000, 20)) == steps


@given(st.integers(1, 50))
def test_a_span_longer_than_the_run_is_the_run(total: int) -> None:
    """Short runs cap their warm-ups, which rise at every step but the last, the end's."""
    assert span_steps("100 epochs", Progress(0, total, 7)) == total
    values = curve(Cosine(1.0, 0.0, warmup="100 epochs"), total, 7)
    assert values[:-1] == sorted(set(values[:-1]))
    assert values[-1] == 0.0


@pytest.mark.parametrize(
    "span", [-0.1, 1.5, 10, float("nan"), "10", "ten epochs", "-3 steps", "5 minutes", ""]
)
def test_what_is_no_span_is_refused_in_a_sentence(span: float | str) -> None:
    """The message names the key and what may be written."""
    for build in (
        lambda: Cosine(1.0, 0.0, warmup=span),
        lambda: Warmup(0.0, 1.0, warmup=span),
    ):
        with pytest.raises(UserError, match=r"\.warmup=.*steps"):
            build()


@pytest.mark.parametrize(
    "schedule",
    [
        Cosine(5e-4, 1e-6, warmup=0.1),
        Cosine(0.996, 1.0),
        Cosine(0.04, 0.4, end_reached=False),
        Warmup(0.04, 0.07, 0.3),
    ],
    ids=["rate", "momentum", "weight decay", "temperature"],
)
def test_a_timed_run_follows_the_same_curve(schedule: Schedule) -> None:
    """A million ticks give at each part of the run what a run of 100,000 steps has there."""
    parts = [percent / 100 for percent in range(101)]
    steps = [schedule(Progress(99_999 * part, 1e5, 1e3)) for part in parts]
    ticks = [schedule(Progress(1e6 * part, 1e6, 1e6)) for part in parts]
    assert ticks == pytest.approx(steps, abs=1e-4 * (max(steps) - min(steps)))


def test_a_timed_run_ends_at_the_end_value_and_stays_there() -> None:
    """The clock may be asked once more after the budget is spent."""
    schedule = Cosine(1.0, 0.125, warmup=0.1)
    assert schedule(Progress(1e6, 1e6, 1e6)) == 0.125
    assert schedule(Progress(11, 10, 1)) == 0.125


# Rate, images a step over all ranks, scaled rate, as the official code has them.
@pytest.mark.parametrize(
    ("rule", "rate", "batch_size", "scaled"),
    [
        ("linear", 0.0005, 64, 0.000125),
        ("linear", 0.0005, 64 * 16, 0.002),
        ("linear", 0.001, 48 * 3, 0.0005625),
        ("linear", 0.00075, 128 * 8, 0.003),
        ("sqrt", 0.004, 2048, DINOV2_RATE),
        ("sqrt", 2e-4, 3072, 2e-4 * math.sqrt(3)),
        ("none", 0.25, 4096, 0.25),
    ],
)
def test_rates_scale_with_the_batch_as_published(
    rule: str, rate: float, batch_size: int, scaled: float
) -> None:
    """Linear per 256 images (DINO), square root per 1024 (DINOv2), or not at all."""
    assert scale_rate(rate, batch_size, rule) == pytest.approx(scaled, rel=1e-12)  # type: ignore[arg-type]


@pytest.mark.parametrize("span", ["1.2.3 epochs", ". steps"])
def test_spans_that_are_no_numbers_are_refused(span: str) -> None:
    """Digits and dots alone make no number."""
    with pytest.raises(UserError):
        Cosine(1.0, 0.0, warmup=span)


def test_warmup_as_long_as_the_run_still_ends_at_end() -> None:
    """The last step has the end value, however long the warm-up."""
    assert Cosine(1.0, 0.0, warmup=1.0)(Progress(9, 10, 10)) == 0.0
