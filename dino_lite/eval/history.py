"""What a network knew after each collection of a sequence: average accuracy, forgetting, transfer.

Row i of a history is measured after stage i, row 0 at the start. Definitions: Lopez-Paz & Ranzato
2017 (arXiv 1706.08840, section 3) and Chaudhry et al. 2018 (arXiv 1801.10112, section 3), with the
accuracy of the start in the place of a random network's.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple


class History(NamedTuple):
    """`accuracy[i][j]` in percent, after stage i on collection j, None if it was not measured;
    `learned[j]`: the stage that trained on j, 0 if the start knew it.
    """

    accuracy: list[list[float | None]]
    learned: list[int]

    @property
    def last(self) -> int:
        """The latest stage."""
        return len(self.accuracy) - 1

    def average_accuracy(self) -> float | None:
        """Mean accuracy on the collections known by now: ACC of Lopez-Paz, A_k of Chaudhry."""
        return _mean(self.accuracy[-1][j] for j in self._known(self.last))

    def backward_transfer(self) -> float | None:
        """Mean change, since each earlier collection was learned, of the accuracy on it: BWT."""
        earlier = self._known(self.last - 1)
        return _mean(self._change(self.learned[j], self.last, j) for j in earlier)

    def forgetting(self) -> float | None:
        """Mean loss of accuracy on the earlier collections since the stage at which it was highest:
        F_k of Chaudhry, whose stages are those that trained, or the start if it knew one.
        """
        first = min(self.learned, default=0)
        lost = []
        for j in self._known(self.last - 1):
            before = [row[j] for row in self.accuracy[first:-1]]
            best, now = (
                max((a for a in before if a is not None), default=None),
                self.accuracy[-1][j],
            )
            lost.append(None if best is None or now is None else best - now)
        return _mean(lost)

    def forward_transfer(self) -> float | None:
        """Mean change of the accuracy on each collection, from the start until just before it was
        learned: FWT. The collection of the first stage has none.
        """
        later = [j for j, stage in enumerate(self.learned) if 1 < stage <= self.last]
        return _mean(self._change(0, self.learned[j] - 1, j) for j in later)

    def summary(self) -> dict[str, float | None]:
        """The four numbers, in percent or points."""
        return {
            "average_accuracy": self.average_accuracy(),
            "forgetting": self.forgetting(),
            "backward_transfer": self.backward_transfer(),
            "forward_transfer": self.forward_transfer(),
        }

    def _known(self, stage: int) -> list[int]:
        return [j for j, learned in enumerate(self.learned) if learned <= stage]

    def _change(self, start: int, end: int, j: int) -> float | None:
        before, after = self.accuracy[start][j], self.accuracy[end][j]
        return None if before is None or after is None else after - before


def _mean(values: Iterable[float | None]) -> float | None:
    """The mean of the numbers in `values`; None if there are none."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
