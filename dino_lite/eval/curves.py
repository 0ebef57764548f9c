"""Training curves from a run's metrics.csv."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
from jaxtyping import Float

from dino_lite.contracts import UserError
from dino_lite.eval.sheets import write_whole

_INK, _GRAY, _LINE, _BLUE, _RUST = "#1f2933", "#6b7785", "#cbd2d9", "#1769aa", "#b4530a"
# The exponential of the entropy of the teacher's mean distribution, column `prototype_perplexity`.
PROTOTYPES = "Effective number of prototypes"
_PANELS = (  # title; column of metrics.csv, label, color
    ("Loss: no measure of quality, and may rise at first", (("loss", "", _INK),)),
    (
        "The teacher's features, top-1 on train (%)",
        (("knn", "k-NN", _BLUE), ("probe", "linear probe", _RUST)),
    ),
    (PROTOTYPES, (("prototype_perplexity", "", _BLUE),)),
    ("Entropy of the teacher's distributions (nats)", (("teacher_entropy", "", _INK),)),
    ("Effective rank of the teacher's features", (("rankme", "", _BLUE),)),
    ("Spread of the teacher's features: near 0 in a collapse", (("feature_std", "", _BLUE),)),
)
_FEW = 40  # up to this many points are drawn as dots
STYLE: dict[str, Any] = {
    "font.size": 8,
    "axes.edgecolor": _LINE,
    "axes.labelcolor": _GRAY,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.axisbelow": True,
    "xtick.color": _GRAY,
    "ytick.color": _GRAY,
    "xtick.major.width": 0.6,
    "ytick.major.size": 0,
}


def curves_picture(metrics: str | Path, path: str | Path) -> None:
    """Draw loss, accuracies and health from a metrics.csv, over optimizer steps."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    known, panels = read_curves(metrics), []
    for title, columns in _PANELS:
        curves = [(known[name], label, hue) for name, label, hue in columns if name in known]
        if curves:
            panels.append((prototypes_title(known) if title == PROTOTYPES else title, curves))
    if not panels:
        raise UserError(f"{metrics} has no number under loss or knn: there is nothing to draw.")
    wide = min(2, len(panels))
    tall = -(-len(panels) // wide)
    with mpl.rc_context(cast(Any, STYLE)):
        figure = Figure(figsize=(4.6 * wide, 2.9 * tall), dpi=150, layout="constrained")
        places = figure.subplots(tall, wide, squeeze=False).flatten()
        for axes, (title, curves) in zip(places, panels, strict=False):
            _draw_panel(axes, title, curves)
        for axes in places[len(panels) :]:
            axes.set_axis_off()
        write_whole(path, lambda part: figure.savefig(part, format="png"))


def read_curve(metrics: str | Path, name: str) -> Float[np.ndarray, "n 2"]:
    """Step and value of each row of a metrics.csv with a finite number under `name`, by step."""
    return read_curves(metrics).get(name, np.empty((0, 2)))


def read_curves(metrics: str | Path) -> dict[str, Float[np.ndarray, "n 2"]]:
    """`read_curve` of every column that contains a number."""
    columns: dict[str, list[tuple[float, float]]] = {}
    try:
        with Path(metrics).open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                step = _number(row.pop("step", None))
                for name, text in row.items():
                    value = _number(text)
                    if math.isfinite(step) and math.isfinite(value):
                        columns.setdefault(name, []).append((step, value))
    except OSError as error:
        raise UserError(f"{metrics} cannot be read ({error.strerror}): nothing to draw.") from error
    arrays = {name: np.array(points, dtype=np.float64) for name, points in columns.items()}
    return {name: a[np.argsort(a[:, 0], kind="stable")] for name, a in arrays.items()}


def prototypes_title(curves: Mapping[str, np.ndarray]) -> str:
    """Title of the curve of `prototype_perplexity`, with their number if known."""
    total = num_prototypes(curves)
    return PROTOTYPES if total is None else f"{PROTOTYPES}, of {total:,}"


def num_prototypes(curves: Mapping[str, np.ndarray]) -> int | None:
    """K, from the logged `prototype_perplexity` and `kl_to_uniform` = ln K - ln perplexity; None if
    they were not logged.
    """
    if not {"prototype_perplexity", "kl_to_uniform"} <= curves.keys():
        return None
    kl, perplexity = (curves[name][-1, 1] for name in ("kl_to_uniform", "prototype_perplexity"))
    return round(math.exp(kl) * float(perplexity))


def _number(text: object) -> float:
    """NaN for anything else: a blank, a truncated line."""
    try:
        return float(str(text))
    except ValueError:
        return math.nan


def number(value: float) -> str:
    """A value as text: 12,000, 49.7, 0.0423, 2e-6."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    size = abs(value)
    if size >= 1000:
        return f"{value:,.0f}"
    if size >= 0.001:
        return f"{float(f'{value:.4g}'):g}"
    mantissa, _, exponent = f"{value:.2e}".partition("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def running_mean(values: Float[np.ndarray, "n"], size: int) -> Float[np.ndarray, "n"]:
    """Mean over `size` neighbors (odd), fewer at the ends."""
    window = np.ones(size)
    count = np.convolve(np.ones_like(values), window, mode="same")
    return np.convolve(values, window, mode="same") / count


def _draw_panel(
    axes: Any, title: str, curves: list[tuple[Float[np.ndarray, "n 2"], str, str]]
) -> None:
    """The curves under one title, each with its last value; labeled if there are several."""
    from matplotlib.ticker import MaxNLocator

    for points, label, color in curves:
        _draw_curve(axes, points, label, color)
    if len(curves) > 1:
        axes.legend(frameon=False, loc="lower right")
    axes.margins(x=0.02, y=0.08)
    axes.set_title(title, loc="left", fontsize=9, fontweight="bold", color=_INK, pad=10)
    axes.set_xlabel("optimizer steps")
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.grid(axis="y", color=_LINE, linewidth=0.4)


def _draw_curve(axes: Any, points: Float[np.ndarray, "n 2"], label: str, color: str) -> None:
    """Few points as dots and lines, many as a pale line under their running mean."""
    steps, values = points.T
    last = number(values[-1])  # not of the running mean, so that the report shows the same
    few = len(points) <= _FEW
    if not few:
        axes.plot(steps, values, color=color, alpha=0.2, linewidth=0.8)
        values = running_mean(values, max(3, len(points) // 30) // 2 * 2 + 1)
    marker = "o" if few else None
    axes.plot(steps, values, color=color, linewidth=1.4, marker=marker, markersize=3, label=label)
    axes.annotate(
        last,
        (steps[-1], values[-1]),
        xytext=(6, 0),
        textcoords="offset points",
        color=color,
        va="center",
        annotation_clip=False,
    )
