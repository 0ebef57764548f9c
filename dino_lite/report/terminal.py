"""Prints results in the terminal."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from dino_lite.eval.results import amount, interval, short
from dino_lite.eval.verdict import judge
from dino_lite.wording import count

_WIDTH = 120  # columns, if the output is not a terminal


def print_results(subjects: Mapping[str, Mapping[str, Any]]) -> None:
    """Print one row per evaluation and subject, with its baselines below it; then the protocol and
    further details of each evaluation.
    """
    console = _console()
    names = list(subjects)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("", "measured by", "value", "95 % interval", "train", "test", "seconds"):
        table.add_column(title, justify="left" if title in ("", "measured by") else "right")
    for name in names:
        for key, found in subjects[name].items():
            table.add_row(
                *(name or key, f"{found['metric']}{_settings(found)}", amount(found)),
                *(interval(found), f"{found['num_train']:,}", f"{found['num_test']:,}"),
                f"{found['seconds']:.1f}",
            )
            for title, other in found.get("baselines", {}).items():
                other = other | {"unit": found["unit"]}
                table.add_row(Text(f"  {title}", "dim"), "", amount(other), interval(other))
    console.print(table)
    for name in names:
        for key, found in subjects[name].items():
            title = f"{name}, {key}" if name else key
            console.print(Text.assemble((title, "bold"), f": {found['protocol']}"))
            for note in found.get("notes", ()):
                console.print(f"  note: {note}", highlight=False)
            for warning in found.get("warnings", ()):
                console.print(f"  warning: {warning}", highlight=False)
            if found["unreadable"]:
                told = f"  {count(found['unreadable'], 'image')} could not be read: left out"
                console.print(told, highlight=False)
            if judgment := judge(found):
                console.print(f"  {judgment.text}", highlight=False)
            if found.get("table"):
                console.print(_records(found["table"]))


def print_comparison(rows: Sequence[Any]) -> None:
    """Print one line for each of `rows` (name, checkpoint, image_size, results), with one column
    per evaluation; then the protocols, with the settings common to all rows.
    """
    console = _console()
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column("")
    table.add_column("pixels", justify="right")
    for key, found in rows[0].results.items():
        table.add_column(f"{key}: {found['metric']}")
    for row in rows:
        cells = [
            Text.assemble(f"{amount(found):>9}", (f"  {interval(found)}", "dim")) if found else ""
            for found in map(row.results.get, rows[0].results)
        ]
        style = "" if row.checkpoint else "dim"
        table.add_row(Text(row.name, style), Text(str(row.image_size), style), *cells)
    console.print(table)
    for key, found in rows[0].results.items():
        each = [row.results[key] for row in rows if key in row.results]
        told = f": {found['protocol']}{_settings(*each)}"
        console.print(Text.assemble((key, "bold"), told))
        for note in found.get("notes", ()):
            console.print(f"  note: {note}", highlight=False)
    if any(found["interval"] for found in rows[0].results.values()):
        console.print(Text("from .. to: 95 % interval of the mean over test images", "dim"))


def _console() -> Console:
    """A console without markup: [final] and :smile: in names are printed literally."""
    width = None if sys.stdout.isatty() else _WIDTH
    return Console(file=sys.stdout, width=width, markup=False, emoji=False)


def _settings(*results: Mapping[str, Any]) -> str:
    """The settings that are equal in all `results`, as " (k=20, …)"."""
    told = ", ".join(
        f"{key}={short(value)}"
        for key, value in results[0]["settings"].items()
        if all(other["settings"].get(key) == value for other in results)
    )
    return f" ({told})" if told else ""


def _records(records: list[dict[str, Any]]) -> Table:
    table = Table(box=None, padding=(0, 2), header_style="dim")
    for title, value in records[0].items():
        table.add_column(title, justify="left" if isinstance(value, str) else "right")
    for record in records:
        table.add_row(*(short(value) for value in record.values()))
    return table
