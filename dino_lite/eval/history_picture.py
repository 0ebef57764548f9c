"""A history as a table of text and as a picture: accuracy after each stage on each collection."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from dino_lite.eval.curves import STYLE
from dino_lite.eval.history import History
from dino_lite.eval.sheets import INK, write_whole
from dino_lite.wording import aligned

_SAID = {
    "average_accuracy": "average accuracy on what is known by now {:.2f} %",
    "forgetting": "forgetting {:.2f} points",
    "backward_transfer": "backward transfer {:+.2f} points",
    "forward_transfer": "forward transfer {:+.2f} points",
}


def history_table(history: History, rows: Sequence[str], columns: Sequence[str]) -> str:
    """The matrix with its titles, and the numbers that follow from it."""
    cells = [["", *columns], *([row, *_cells(history, i)] for i, row in enumerate(rows))]
    told = history.summary()
    said = [text.format(told[key]) for key, text in _SAID.items() if told[key] is not None]
    title = "k-NN accuracy (%) after each stage; in brackets before a collection was trained on"
    return "\n".join([title, *aligned(cells, "<>"), ", ".join(said)]).rstrip()


def _cells(history: History, row: int) -> list[str]:
    """Accuracies after a stage as text."""
    values = history.accuracy[row]
    known = [row >= learned for learned in history.learned]
    return [
        "" if value is None else f"{value:.2f} " if own else f"({value:.2f})"
        for value, own in zip(values, known, strict=True)
    ]


def history_picture(
    history: History, rows: Sequence[str], columns: Sequence[str], path: Path
) -> None:
    """Draw the matrix with colors by accuracy; a frame marks the stage that trained on it."""
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    values = [[float("nan") if v is None else v for v in row] for row in history.accuracy]
    with mpl.rc_context(cast(Any, STYLE)):
        size = (1.6 + 1.0 * len(columns), 1.0 + 0.45 * len(rows))
        figure = Figure(figsize=size, dpi=150, layout="constrained")
        axes = figure.subplots()
        axes.imshow(values, cmap="Blues", vmin=0, vmax=160, aspect="auto")  # text stays readable
        for i, row in enumerate(history.accuracy):
            for j, value in enumerate(row):
                told = "–" if value is None else f"{value:.1f}"
                axes.text(j, i, told, ha="center", va="center", color=INK)
        for j, learned in enumerate(history.learned):
            if learned < len(rows):
                frame = Rectangle((j - 0.47, learned - 0.45), 0.94, 0.9, fill=False, edgecolor=INK)
                axes.add_patch(frame)
        axes.set_xticks(range(len(columns)), [name[:14] for name in columns])
        axes.set_yticks(range(len(rows)), list(rows))
        axes.set_title("k-NN accuracy (%) on each collection", loc="left", fontsize=9)
        write_whole(path, lambda part: figure.savefig(part, format="png"))
