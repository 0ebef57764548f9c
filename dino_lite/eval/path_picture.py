"""The line from start to end as a picture: gain and loss over alpha."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from dino_lite.eval.curves import STYLE
from dino_lite.eval.sheets import BLUE, GRAY, INK, LINE, ORANGE, write_whole

_COLORS = (BLUE, ORANGE, INK, GRAY)


def path_picture(
    points: Mapping[str, Sequence[Mapping[str, Any]]],
    chosen: float | None,
    max_loss: float | None,
    path: Path,
) -> None:
    """Draw the change of each collection's score in points, with its interval, over alpha; `chosen`
    and -`max_loss` as lines. A point has the keys alpha, change and change_interval.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(cast(Any, STYLE)):
        figure = Figure(figsize=(5.6, 3.6), dpi=150, layout="constrained")
        axes = figure.subplots()
        axes.axhline(0, color=LINE, linewidth=0.8)
        for color, (title, line) in zip(_COLORS * len(points), points.items(), strict=False):
            alphas, changes = ([each[key] for each in line] for key in ("alpha", "change"))
            low, high = zip(*(each["change_interval"] for each in line), strict=True)
            axes.fill_between(alphas, low, high, color=color, alpha=0.15, linewidth=0)
            axes.plot(alphas, changes, color=color, linewidth=1.4, marker="o", ms=3, label=title)
        if chosen is not None:
            axes.axvline(chosen, color=GRAY, linewidth=0.8, linestyle=":")
            axes.annotate(f" alpha {chosen:g}", (chosen, 1), xycoords=("data", "axes fraction"))
        if max_loss is not None:
            axes.axhline(-max_loss, color=ORANGE, linewidth=0.8, linestyle="--")
        axes.set_xlabel("alpha: 0 is the start, 1 the end of training")
        axes.set_title("Change on images held out of train (points)", loc="left", fontsize=9)
        axes.legend(frameon=False, loc="best")
        write_whole(path, lambda part: figure.savefig(part, format="png"))
