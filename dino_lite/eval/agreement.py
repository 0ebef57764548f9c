"""Agreement of a student with its teacher beside accuracy: what shows that it learns mistakes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple


class Standing(NamedTuple):
    """Accuracy of a student, and how often it predicts what its teacher predicts (None without a
    teacher), both in percent of `num` images; `name` says when, as "generation 2" or "step 300".
    """

    name: str
    accuracy: float
    agreement: float | None
    num: int


def learned_mistakes(standings: Sequence[Standing]) -> list[str]:
    """A sentence for each standing at which agreement rose while accuracy fell, compared with the
    one before: the student then copies its teacher's mistakes. A fall counts if it is beyond the
    95 % interval of the difference of two independent proportions, which is wider than needed for
    the same images.
    """
    told = []
    for before, now in pairwise(standings):
        if before.agreement is None or now.agreement is None:
            continue
        if now.agreement > before.agreement and _fell(before, now):
            told.append(
                f"from {before.name} to {now.name} agreement with the teacher rose from "
                f"{before.agreement:.1f} to {now.agreement:.1f} % while accuracy fell from "
                f"{before.accuracy:.1f} to {now.accuracy:.1f} %: the student learns its teacher's "
                f"mistakes, so {before.name} was better."
            )
    return told


def _fell(before: Standing, now: Standing) -> bool:
    shares = [(each.accuracy / 100, each.num) for each in (before, now)]
    error = math.sqrt(sum(share * (1 - share) / num for share, num in shares))
    return before.accuracy - now.accuracy > 100 * 1.96 * error
