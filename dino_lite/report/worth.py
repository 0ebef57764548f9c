"""Renders results.json as bars and tables."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from dino_lite.eval.curves import number
from dino_lite.eval.results import amount, interval, short
from dino_lite.report.markup import Markup, folded, join, table, tag
from dino_lite.report.story import Result

_BAR, _HIGH = 240, 18  # width and height of a bar in pixels
_TITLES = ("value", "95 % interval", "train", "test", "seconds")


class _Line(NamedTuple):
    """A row of the table: a result, or one of its baselines."""

    title: str
    bar: Markup
    cells: list[str]  # as _TITLES
    own: bool


def worth_section(results: list[Result], folder: Path | None = None) -> Markup:
    """All evaluations with their baselines, protocols and further details; `folder` is the run's or
    export's.
    """
    if not results:
        command = shlex.join(["dino-lite", "evaluate", f"checkpoint={folder or 'FILE'}"])
        told = f"No results yet: with labels, {command} adds them."
        return tag("p", told, class_="note")
    several = len({result.checkpoint for result in results}) > 1
    lines = [line for result in results for line in _lines(result, several)]
    used = [place for place in range(len(_TITLES)) if any(line.cells[place] for line in lines)]
    head = [tag("th", _TITLES[place]) for place in used]
    head = [tag("th", "measured"), head[0], tag("th"), *head[1:]]
    rows = [
        tag(
            "tr",
            tag("th", line.title, scope="row"),
            tag("td", line.cells[0], class_="number"),
            tag("td", line.bar),
            *(tag("td", line.cells[place], class_="number") for place in used[1:]),
            class_="own" if line.own else "baseline",
        )
        for line in lines
    ]
    body = tag("table", tag("thead", tag("tr", *head)), tag("tbody", *rows))
    details = [_protocol(result, several) for result in results]
    return join(
        tag("div", body, class_="scroll worth", tabindex=0),
        folded("Protocols", *details),
    )


def adaptation_section(found: Mapping[str, Any] | None) -> Markup:
    """Before and after an adaptation (runs/promise.py), with 95 % intervals; empty without one."""
    if not found:
        return Markup()
    rows = []
    for each in found["collections"]:
        values = [f"{each[at]['value']:.2f}" for at in ("start", "adapted", "end")]
        low, high = each["adapted"]["change_interval"]
        change = f"{each['adapted']['change']:+.2f} ({low:+.2f} to {high:+.2f})"
        measured = f"{each['start']['num']:,} {each['images']}"
        rows.append([each["name"], f"{each['metric']}, {measured}", *values, change])
    head = ["", "measured", "start", f"adapted (alpha {found['alpha']:g})", "end", "change"]
    told = [tag("p", sentence, class_="note") for sentence in found["sentences"]]
    return join(tag("h3", "Before and after"), table(head, rows, numeric=2), *told)


def _lines(result: Result, several: bool) -> list[_Line]:
    """The row of a result, followed by its baselines."""
    found = result.found
    entries = [(title_of(result, several), found), *(found.get("baselines") or {}).items()]
    values = [entry["value"] for _, entry in entries] + [
        bound for _, entry in entries for bound in entry.get("interval") or ()
    ]
    most = 100.0 if found.get("unit") == "%" else max(map(abs, values)) or 1.0
    counts = [found.get(key) for key in ("num_train", "num_test", "seconds")]
    told = ["" if count is None else number(count) for count in counts]
    return [
        _Line(
            title,
            _bar(entry, most),
            [value_of(entry, found), _interval(entry, found), *([""] * 3 if place else told)],
            place == 0,
        )
        for place, (title, entry) in enumerate(entries)
    ]


def title_of(result: Result, several: bool) -> str:
    """The metric, with the data if not the run's, and with the checkpoint if `several`."""
    _, at, data = result.name.partition("@")
    title = str(result.found.get("metric", result.name))
    title += f" on {data}" if at else ""
    return f"{title} ({result.checkpoint})" if several and result.checkpoint else title


def value_of(entry: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    """The value of a result, or of its baseline, in the result's unit, without line breaks."""
    told = amount({"value": entry["value"], "unit": str(found.get("unit", ""))})
    return told.replace(" ", "\u00a0")


def _interval(entry: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    return interval({"interval": entry.get("interval"), "unit": found.get("unit", "")})


def _bar(entry: Mapping[str, Any], most: float) -> Markup:
    """A bar from 0 to the value, with its interval as a whisker; hidden from screen readers, as the
    numbers are next to it.
    """

    def x(value: float) -> float:
        return round(_BAR * min(max(value / most, 0.0), 1.0), 1)

    parts = [
        tag("rect", width=_BAR, height=_HIGH, rx=3, class_="track"),
        tag("rect", width=x(entry["value"]), height=_HIGH, rx=3, class_="value"),
    ]
    if entry.get("interval"):
        low, high = (x(bound) for bound in entry["interval"])
        parts.append(tag("path", d=f"M{low} 5V13M{low} 9H{high}M{high} 5V13", class_="whisker"))
    return tag(
        "svg",
        *parts,
        viewBox=f"0 0 {_BAR} {_HIGH}",
        class_="bar",
        preserveAspectRatio="none",
        aria_hidden="true",
    )


def _protocol(result: Result, several: bool) -> Markup:
    found = result.found
    settings = ", ".join(f"{key} = {short(v)}" for key, v in (found.get("settings") or {}).items())
    told = "; ".join(part for part in (str(found.get("protocol", "")), settings) if part)
    told = "; ".join([told, *(found.get("notes") or ())])
    parts = [tag("h3", title_of(result, several)), tag("p", told, class_="note")]
    records = found.get("table")
    if isinstance(records, list) and records and all(isinstance(r, dict) for r in records):
        head = list(records[0])
        rows = [[short(record.get(key, "")) for key in head] for record in records]
        parts.append(table([str(key) for key in head], rows))
    return join(*parts)
