"""Schedules: warm-ups and cosines over optimizer steps, or over the clock of a timed run."""

from __future__ import annotations

import math
import re
from typing import Annotated, Any, Literal

from dino_lite.contracts import Progress, UserError
from dino_lite.settings.kinds import Must, Value
from dino_lite.settings.validate import checked

RateRule = Literal["linear", "sqrt", "none"]
_SPAN = re.compile(
    r"\s*([0-9]+(?:\.[0-9]*)?(?:e-?[0-9]+)?)\s*(ep|epochs?|st|steps?)\s*", re.IGNORECASE
)


def parse_span(span: str) -> tuple[float, str]:
    """Parse "10 epochs" to (10.0, "epoch") and "500 steps" to (500.0, "step"). Raises UserError."""
    match = _SPAN.fullmatch(span)
    if match is None:
        raise UserError(
            f'{span!r} is not a duration: write a fraction of the run (0.1), "10 epochs" or '
            '"500 steps".'
        )
    return float(match[1]), "epoch" if match[2].lower().startswith("e") else "step"


def _is_span(span: Any) -> bool:
    return 0 <= span <= 1 if not isinstance(span, str) else _SPAN.fullmatch(span) is not None


# A duration within the run.
Span = Annotated[
    float | int | str,
    Must('a fraction of the run in [0, 1], "10 epochs" or "500 steps"', _is_span),
]


def span_steps(span: Span, at: Progress) -> float:
    """`span` in steps (ticks if timed) of this run, at most the run's length."""
    if isinstance(span, str):
        count, unit = parse_span(span)
        steps = count * (at.steps_per_epoch if unit == "epoch" else 1)
    else:
        steps = span * at.total
    return min(round(steps), at.total)


class Constant:
    """A constant value."""

    def __init__(self, value: Value) -> None:
        self.value = float(value)

    def __call__(self, at: Progress) -> float:
        return self.value


class Cosine:
    """Linear warm-up from `start` to `base`, then half a cosine to `end` (DINO, section 3.2; SGDR).

    With `end_reached` (ours), `base` is reached on the first step after the warm-up and `end`
    exactly on the last step. Without it (the references), the warm-up includes both of its ends, so
    that `base` occurs twice, and the cosine stops one step short of `end`.
    """

    @checked
    def __init__(
        self,
        base: Value,
        end: Value,
        start: Value = 0.0,
        warmup: Span = 0.0,
        end_reached: bool = True,
    ) -> None:
        self.base, self.end, self.start = float(base), float(end), float(start)
        self.warmup, self.end_reached = warmup, end_reached

    def __call__(self, at: Progress) -> float:
        warm = span_steps(self.warmup, at)
        if self.end_reached:
            warm = min(warm, at.total - 1)  # the last step has `end`
        if at.step < warm:
            last = (
                warm if self.end_reached else warm - 1
            )  # linspace(start, base, warm) has warm - 1 gaps
            return self.start + (self.base - self.start) * (at.step / last if last > 0 else 0.0)
        rest = at.total - warm - (1 if self.end_reached else 0)
        turn = 1.0 if rest <= 0 else min(1.0, (at.step - warm) / rest)
        return self.end + 0.5 * (self.base - self.end) * (1 + math.cos(math.pi * turn))


class Warmup:
    """Linear from `start` to `end`, both included, over `warmup`, then constant: the teacher
    temperature (DINO, appendix).

    The value changes every epoch with `per="epoch"`, as in DINO, or every step with `per="step"`,
    as in DINOv2.
    """

    @checked
    def __init__(
        self, start: Value, end: Value, warmup: Span = 0.0, per: Literal["step", "epoch"] = "step"
    ) -> None:
        self.start, self.end, self.warmup, self.per = float(start), float(end), warmup, per

    def __call__(self, at: Progress) -> float:
        num = span_steps(self.warmup, at)
        step = at.step
        if self.per == "epoch":
            num, step = round(num / at.steps_per_epoch), at.epoch
        if step >= num:
            return self.end
        return self.start + (self.end - self.start) * (step / (num - 1) if num > 1 else 0.0)


def scale_rate(rate: float, batch_size: int, rule: RateRule) -> float:
    """Learning rate for `batch_size` images per step over all ranks: scaled linearly from 256
    (DINO) or by the square root from 1024 (DINOv2).
    """
    if rule == "linear":
        return rate * batch_size / 256.0
    if rule == "sqrt":
        return rate * math.sqrt(batch_size / 1024.0)
    return rate
