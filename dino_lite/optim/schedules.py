"""Every number that follows the run: warm-ups and cosines over optimizer steps, or over the clock
of a timed run.
"""

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
    """ "10 epochs" is (10.0, "epoch"), "500 steps" is (500.0, "step"); UserError where it is
    neither.
    """
    match = _SPAN.fullmatch(span)
    if match is None:
        raise UserError(
            f'{span!r} is no length of time: write a fraction of the run (0.1), "10 epochs" or '
            '"500 steps".'
        )
    return float(match[1]), "epoch" if match[2].lower().startswith("e") else "step"


def _is_span(span: Any) -> bool:
    return 0 <= span <= 1 if not isinstance(span, str) else _SPAN.fullmatch(span) is not None


# A length of time within the run.
Span = Annotated[
    float | int | str,
    Must('a fraction of the run in [0, 1], "10 epochs" or "500 steps"', _is_span),
]


def span_steps(span: Span, at: Progress) -> float:
    """Length of `span` in steps of this run, capped by the run's length."""
    if isinstance(span, str):
        count, unit = parse_span(span)
        steps = count * (at.steps_per_epoch if unit == "epoch" else 1)
    else:
        steps = span * at.total
    return min(round(steps), at.total)


class Constant:
    """The same value always."""

    def __init__(self, value: Value) -> None:
        self.value = float(value)

    def __call__(self, at: Progress) -> float:
        return self.value


class Cosine:
    """Linear warm-up from `start` to `base`, then half a cosine to `end` (DINO, section 3.2; SGDR).

    With `end_reached` (ours) the warm-up arrives at `base` on its last step plus one, and the last
    step of the run has exactly `end`. Without it (the references): both ends of the warm-up are
    included, so `base` comes twice, and the cosine stops one step short of `end`.
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
            warm = min(warm, at.total - 1)  # the last step is the end's
        if at.step < warm:
            last = (
                warm if self.end_reached else warm - 1
            )  # linspace(start, base, warm) has warm - 1 gaps
            return self.start + (self.base - self.start) * (at.step / last if last > 0 else 0.0)
        rest = at.total - warm - (1 if self.end_reached else 0)
        turn = 1.0 if rest <= 0 else min(1.0, (at.step - warm) / rest)
        return self.end + 0.5 * (self.base - self.end) * (1 + math.cos(math.pi * turn))


class Warmup:
    """Linear from `start` to `end` over `warmup`, both included, then `end`: the teacher
    temperature (DINO, appendix).

    `per="epoch"` holds the value during an epoch, as DINO does; `per="step"` moves it each step, as
    DINOv2 does.
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
    """Learning rate for `batch_size` images a step over all ranks: linear per 256 (DINO), sqrt per
    1024 (DINOv2).
    """
    if rule == "linear":
        return rate * batch_size / 256.0
    if rule == "sqrt":
        return rate * math.sqrt(batch_size / 1024.0)
    return rate
