"""Annotations that say which values a setting may have: `drop_path: Fraction`.

They are plain `int`, `float` or `Sequence` to type checkers; `settings.validate` reads the rest.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Annotated, Any, NamedTuple


class Must(NamedTuple):
    """Metadata of `Annotated`: `be` completes "it must be ...", `holds` tests values of the
    annotated type.
    """

    be: str
    holds: Callable[[Any], bool]


class Values(NamedTuple):
    """Metadata of a Schedule's annotation: what its numbers (each a `Value`) must be."""

    kind: Any


class KeywordsOf:
    """Metadata of `**keywords`: they are passed on to `takers`, whose annotations hold for them."""

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
# A share that is not nothing, as the decay of rates from layer to layer.
Share = Annotated[float, Must("a number above 0 and at most 1", lambda value: 0 < value <= 1)]
# A number of a schedule: what it may be is for whoever takes the schedule to say (`Values`).
Value = Annotated[float, "value"]
# Two of them, as the bounds of a random crop's area in parts of the image's.
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
Sizes = Annotated[Sequence[Size], Must("a list of whole numbers of at least 1, not empty", bool)]
