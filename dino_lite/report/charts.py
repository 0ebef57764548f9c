"""Curves as inline SVG; the page provides colors, and values at the pointer by its script."""

from __future__ import annotations

import json
import math
from fnmatch import fnmatch
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from dino_lite.eval.curves import number, prototypes_title, running_mean
from dino_lite.eval.verdict import loss_note
from dino_lite.report.markup import Markup, folded, join, tag

_WIDTH, _HEIGHT = 400, 190
_LEFT, _TOP, _RIGHT, _BOTTOM = 46, 10, 392, 164  # plot area
_MOST = 240  # points drawn; with more, the range between them is a pale band
_FEW = 40  # points up to which each is drawn as a dot

Points = Float[np.ndarray, "n 2"]


class Group(NamedTuple):
    """Related curves; `names` may be patterns."""

    title: str
    text: str
    names: tuple[str, ...]


_GROUPS = (
    Group("Learning", "", ("knn", "probe", "loss", "*_loss", "loss_*", "knn_*", "probe_*")),
    Group(
        "Health",
        "A collapse shows here first: entropy or standard deviation near zero, an effective number "
        "of prototypes near one.",
        (
            *("prototype_perplexity", "teacher_entropy", "kl_to_uniform"),
            *("rankme", "feature_std", "embedding_std", "agreement", "center_norm", "grad_norm"),
        ),
    ),
    Group("Schedules", "", ("learning_rate", "weight_decay", "momentum", "*_temp", "*_weight")),
    Group("Speed", "", ("images_per_second", "data_wait", "*_seconds", "*memory*")),
)
_TITLES = {
    "loss": "Loss",
    "knn_agreement": "k-NN agrees with that of the frozen teacher (%)",
    "knn": "k-NN of the teacher, top-1 on train (%)",
    "probe": "Linear probe of the teacher, top-1 (%)",
    "teacher_entropy": "Entropy of the teacher (nats)",
    "kl_to_uniform": "KL of the mean teacher to uniform (nats)",
    "prototypes_used": "Prototypes that are the most probable of some crop",
    "rankme": "RankMe: effective rank of the features",
    "feature_std": "Standard deviation of the features",
    "agreement": "Agreement of student and teacher",
    "center_norm": "Norm of the center",
    "grad_norm": "Norm of the gradient",
    "skipped": "Steps skipped in a row",
    "learning_rate": "Learning rate",
    "weight_decay": "Weight decay",
    "momentum": "Momentum of the teacher",
    "teacher_temp": "Temperature of the teacher",
    "images_per_second": "Images per second",
    "data_wait": "Fraction of time waiting for data",
    "knn_seconds": "Seconds for k-NN",
    "probe_seconds": "Seconds for the linear probe",
    "features_seconds": "Seconds for the features of both",
    "health_seconds": "Seconds for the health statistics",
    "embedding_std": "Standard deviation of the embeddings",
}
_UNDRAWN = ("step", "epoch", "progress")


def curve_sections(curves: dict[str, Points]) -> Markup:
    """All curves by group; those of no group are collapsed at the end.

    A loss term that equals the total loss is not drawn again.
    """
    loss = curves.get("loss")
    left = {
        name: points
        for name, points in curves.items()
        if name not in _UNDRAWN and (name == "loss" or not _same(points, loss))
    }
    sections, titles = [], _TITLES | {"prototype_perplexity": prototypes_title(curves)}
    for group in _GROUPS:
        chosen = {
            name: left.pop(name)
            for pattern in group.names
            for name in sorted(left)
            if fnmatch(name, pattern)
            and not (pattern.startswith(("knn_", "probe_")) and name.endswith("_seconds"))
        }
        if chosen:
            told = f"Loss. {loss_note(curves)}" if "loss" in chosen else group.text
            text = tag("p", told, class_="note") if told else Markup()
            drawn = _grid(chosen, titles, group.title == "Learning")
            sections.append(join(tag("h3", group.title), text, drawn))
    if left:
        sections.append(folded("More curves", _grid(dict(sorted(left.items())), titles)))
    return join(*sections)


def _same(points: Points, others: Float[np.ndarray, "m 2"] | None) -> bool:
    return others is not None and np.array_equal(points, others)


def _grid(curves: dict[str, Points], titles: dict[str, str], large: bool = False) -> Markup:
    charts = (line_chart(curves[name], titles.get(name, name.replace("_", " "))) for name in curves)
    return tag("div", *charts, class_="charts large" if large else "charts")


def line_chart(points: Points, title: str) -> Markup:
    """One curve with axes and its last value above it. If there are many points, draws their
    running mean on a band from minimum to maximum.
    """
    band, line = _thinned(points)
    axis_x = _ticks(0.0 if points[0, 0] >= 0 else points[0, 0], max(points[-1, 0], 1.0), 4)
    low, high = _padded(points[:, 1])
    axis_y = _ticks(low, high, 5)
    area = (axis_x[0] if axis_x[0] < points[0, 0] else min(points[0, 0], 0.0), points[-1, 0])
    place = _Place(area[0], max(area[1], area[0] + 1e-9), low, high)
    told = (
        f"{title}: {number(points[0, 1])} at step {number(points[0, 0])}, "
        f"{number(points[-1, 1])} at step {number(points[-1, 0])}"
    )
    marks = [
        tag("circle", cx=place.x(x), cy=place.y(y), r=2.6, class_="dot")
        for x, y in (line if len(points) <= _FEW else line[-1:])
    ]
    svg = tag(
        "svg",
        tag("title", told),
        *_grid_lines(place, axis_x, axis_y),
        *([tag("path", d=place.path(band), class_="band")] if len(band) else []),
        tag("path", d=place.path(line), class_="curve"),
        *marks,
        tag("line", class_="cross", y1=_TOP, y2=_BOTTOM, x1=-9, x2=-9),
        tag("circle", class_="here", r=4, cx=-9, cy=-9),
        viewBox=f"0 0 {_WIDTH} {_HEIGHT}",
        role="img",
        aria_label=told,
        data_points=json.dumps(
            [[place.x(x), place.y(y), number(x), number(y)] for x, y in line],
            separators=(",", ":"),
        ),
    )
    head = tag("figcaption", tag("span", title), tag("output", number(points[-1, 1])))
    return tag("figure", head, svg, class_="chart")


class _Place(NamedTuple):
    """Maps values to coordinates in the drawing."""

    left: float
    right: float
    low: float
    high: float

    def x(self, step: float) -> float:
        part = (step - self.left) / (self.right - self.left)
        return round(float(_LEFT + part * (_RIGHT - _LEFT)), 1)

    def y(self, value: float) -> float:
        part = (value - self.low) / (self.high - self.low)
        return round(float(_BOTTOM - part * (_BOTTOM - _TOP)), 1)

    def path(self, points: Points) -> str:
        return "M" + "L".join(f"{self.x(x)} {self.y(y)}" for x, y in points)


def _grid_lines(place: _Place, axis_x: list[float], axis_y: list[float]) -> list[Markup]:
    """Horizontal grid lines, and tick labels of both axes."""
    drawn = []
    for value in axis_y:
        if place.low <= value <= place.high:
            y = place.y(value)
            drawn.append(tag("line", x1=_LEFT, x2=_RIGHT, y1=y, y2=y, class_="rule"))
            drawn.append(tag("text", number(value), x=_LEFT - 7, y=y + 3.5, class_="y"))
    for step in axis_x:
        if place.left <= step <= place.right:
            x = place.x(step)
            anchor = "end" if x > _RIGHT - 12 else None
            drawn.append(
                tag("text", number(step), x=x, y=_HEIGHT - 8, class_="x", text_anchor=anchor)
            )
    return drawn


def _thinned(points: Points) -> tuple[Float[np.ndarray, "b 2"], Float[np.ndarray, "l 2"]]:
    """The points of the band (empty if there are few points) and of the line."""
    if len(points) <= _FEW:
        return np.empty((0, 2)), points
    size = max(3, len(points) // 30) // 2 * 2 + 1
    smooth = np.stack([points[:, 0], running_mean(points[:, 1], size)], axis=1)
    parts = np.array_split(np.arange(len(points)), min(_MOST, len(points)))
    if len(points) <= _MOST:
        return points, smooth
    band: list[Any] = []
    for rows in parts:
        part = points[rows]
        ends = sorted({int(part[:, 1].argmin()), int(part[:, 1].argmax())})
        band.extend(part[ends])
    return np.array(band), smooth[[int(rows[len(rows) // 2]) for rows in parts[:-1]] + [-1]]


def _padded(values: Float[np.ndarray, "n"]) -> tuple[float, float]:
    low, high = float(values.min()), float(values.max())
    room = 0.08 * (high - low) or 0.1 * abs(high) or 1.0
    return (0.0 if 0 <= low < room else low - room), high + room


def _ticks(low: float, high: float, count: int) -> list[float]:
    """Round numbers from below `low` to above `high`, about `count` steps of 1, 2 or 5 · 10^n."""
    rough = max(high - low, 1e-300) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * times for times in (1, 2, 5, 10) if power * times >= rough * 0.999)
    first = math.floor(low / step)
    return [float(f"{(first + i) * step:.12g}") for i in range(count + 3)]
