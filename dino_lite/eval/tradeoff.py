"""What adaptation gained and lost: paired differences, and the choice of a point on a path.

All scores are one per image, in percent, of the same images in the same order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dino_lite.contracts import UserError
from dino_lite.eval.results import bootstrap
from dino_lite.settings.kinds import NonNegative, whole

_UNSEEN = 300  # percent times images


class Promise(NamedTuple):
    """The group `adapt`. `max_loss`: points of k-NN accuracy that each kept collection may lose;
    null: any; auto: 1, if one of them has labels. `images`: of the train split of each collection
    that are measured at every point, at most.
    """

    max_loss: NonNegative | Literal["auto"] | None = "auto"
    images: Annotated[int, whole(20)] = 50_000

    def limit(self, labeled: bool) -> float | None:
        """`max_loss` where a kept collection is `labeled`, or none is. Raises UserError for a limit
        on nothing.
        """
        if self.max_loss == "auto":
            return 1.0 if labeled else None
        if self.max_loss is not None and not labeled:
            raise UserError(
                f"adapt.max_loss={self.max_loss:g} limits what is lost on a labeled collection, "
                "and there is none: name one by keep.root=, or leave it out."
            )
        return self.max_loss


class Change(NamedTuple):
    """The mean difference of scores in points, its 95 % interval, and the number of images."""

    value: float
    low: float
    high: float
    num: int

    @property
    def half_width(self) -> float:
        """Half the width of the interval, but not below 300/n: if none of n images changes, up to
        3/n of all may (95 %; Hanley & Lippman-Hand 1983).
        """
        return max((self.high - self.low) / 2, _UNSEEN / self.num)

    def __str__(self) -> str:
        return f"{self.value:+.2f} ({self.low:+.2f} to {self.high:+.2f})"


def change(before: Float[Tensor, "n"], after: Float[Tensor, "n"]) -> Change:
    """`after` less `before`, with a paired bootstrap: both scores of an image are drawn together
    (Efron & Tibshirani 1993, section 8.3), so that what makes images hard cancels.
    """
    difference = after.double() - before.double()
    return Change(float(difference.mean()), *bootstrap(difference), len(difference))


def choose(
    gains: Sequence[float], losses: Sequence[Sequence[float]], max_loss: float | None
) -> int:
    """The index of the largest gain, the first of equal ones, among the points that lose at most
    `max_loss` on each of the collections in `losses` (collection, point); None: any.

    The first point is the start, which loses nothing.
    """
    allowed = [
        point
        for point in range(len(gains))
        if max_loss is None or all(each[point] <= max_loss for each in losses)
    ]
    return max(allowed or [0], key=lambda point: (gains[point], -point))


def images_to_resolve(found: Change, max_loss: float) -> float:
    """How many images would have an interval of half width `max_loss`, if half widths fall with the
    root of the number; infinite for a loss of 0.
    """
    if max_loss == 0:
        return math.inf
    by_interval = found.num * ((found.high - found.low) / 2 / max_loss) ** 2
    return math.ceil(max(by_interval, _UNSEEN / max_loss))


def agreement(one: Int[Tensor, "n k"], other: Int[Tensor, "n k"]) -> Float[Tensor, "n"]:
    """For each image the percent of its k nearest neighbors that two networks have in common, given
    their indices.
    """
    k = one.shape[1]
    both = torch.cat([one, other], dim=1).sort(dim=1).values
    return 100.0 * (both[:, 1:] == both[:, :-1]).sum(dim=1).double() / k
