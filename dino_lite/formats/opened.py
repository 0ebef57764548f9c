"""A backbone that was read from somewhere, and what is known about it."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any, NamedTuple

from dino_lite.contracts import Backbone


class Fit(NamedTuple):
    """How a file's weights filled a backbone: whose names they have, how many there are, and the
    names in the file that were left unused, and of those that had to be adapted.
    """

    layout: str
    num_weights: int
    unused: list[str]
    adapted: list[str]

    def notes(self, spec: dict[str, Any]) -> tuple[str, ...]:
        """Sentences: what matched, what did not, and the `spec` that was read from the shapes."""
        notes = [
            f"weights in {self.layout}'s layout: all {self.num_weights} of the backbone are there",
            "built as " + ", ".join(f"{key}={value}" for key, value in spec.items()),
        ]
        if self.unused:
            notes.append(f"left unused: {_summary(self.unused, 2)}")
        if self.adapted:
            notes.append(f"adapted: {_summary(self.adapted, 4)}")
        return tuple(notes)


class Opened(NamedTuple):
    """A backbone in eval mode on the CPU, and how to use it.

    `mean` and `std` normalize pixels in [0, 1], one value per channel. `card` is plain JSON that
    says what trained it. `data` is the data configuration of its run, `fit` how foreign weights
    matched; each is None where it does not apply.
    """

    backbone: Backbone
    image_size: int  # pixels per side
    mean: tuple[float, ...]
    std: tuple[float, ...]
    card: dict[str, Any]
    data: dict[str, Any] | None = None
    fit: Fit | None = None

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences about how foreign weights matched."""
        return () if self.fit is None else self.fit.notes(self.backbone.spec)


def _summary(names: list[str], num_parts: int) -> str:
    """The first parts of names, without their last and with * for blocks' numbers, counted."""
    split = [re.sub(r"\.\d+(?=\.)", ".*", name).split(".") for name in names]
    short = Counter(".".join(parts[:-1][:num_parts]) or parts[0] for parts in split)
    kinds = sorted(short.items(), key=lambda kind: -kind[1])
    shown = ", ".join(f"{kind} ({num})" if num > 1 else kind for kind, num in kinds[:4])
    rest = sum(num for _, num in kinds[4:])
    return f"{shown} and {rest} more" if rest else shown
