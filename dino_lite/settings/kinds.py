"""Annotations that constrain the values of a setting, such as `drop_path: Fraction`.

To type checkers they are plain `int`, `float` or `Sequence`; `settings.validate` checks the rest.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Annotated, Any, NamedTuple


class Must(NamedTuple):
    """Metadata of `Annotated`: `be` completes "it must be ...", `holds` tests a value of the
    annotated type.
    """

    be: str
    holds: Callable[[Any], bool]


class Values(NamedTuple):
    """Metadata of a Schedule's annotation: `kind` annotates its numbers (each a `Value`)."""

    kind: Any


class KeywordsOf:
    """Metadata of `**keywords` that are passed on to `takers`, whose annotations apply."""

    def __init__(self, *takers: Any) -> None:
        self.takers = takers


def whole(low: int) -> Must:
    """Metadata of an int of at least `low`."""
    return Must(f"a whole number of at least {low}", lambda value: value >= low)


def within(low: float, high: float) -> Must:
    """Metadata of a float in [low, high]."""
    return Must(f"a number in [{low:g}, {high:g}]", lambda value: low <= value <= high)


def rising(low: float = -math.inf, high: float = math.inf) -> Must:
    """Metadata of a list of two floats: low <= first <= second <= high."""
    bounds = "" if math.isinf(low) else f" between {low:g} and {high:g}"
    return Must(
        f"a list of two numbers{bounds}, the smaller first",
        lambda pair: len(pair) == 2 and low <= pair[0] <= pair[1] <= high,
    )


Count = Annotated[int, whole(0)]
Size = Annotated[int, whole(1)]
Fraction = Annotated[float, within(0, 1)]
Positive = Annotated[float, Must("a number above 0", lambda value: value > 0)]
NonNegative = Annotated[float, Must("a number of at least 0", lambda value: value >= 0)]
# A fraction above 0, such as layer-wise learning-rate decay.
Share = Annotated[float, Must("a number above 0 and at most 1", lambda value: 0 < value <= 1)]
# A number of a schedule; the function that takes the schedule constrains it (`Values`).
Value = Annotated[float, "value"]
# Two of them, such as the bounds of a random crop's area as fractions of the image's.
Shares = Annotated[
    Sequence[float],
    Must(
        "a list of two numbers above 0 and at most 1, the smaller first",
        lambda pair: len(pair) == 2 and 0 < pair[0] <= pair[1] <= 1,
    ),
]
# Lists that are not empty.
Numbers = Annotated[Sequence[float], Must("a list of numbers, not empty", bool)]
PositiveNumbers = Annotated[Sequence[Positive], Must("a list of numbers above 0, not empty", bool)]
# Height and width in pixels.
Sides = Annotated[
    Sequence[Size],
    Must("a list of two whole numbers of at least 1, rows and columns", lambda two: len(two) == 2),
]
Sizes = Annotated[Sequence[Size], Must("a list of whole numbers of at least 1, not empty", bool)]
