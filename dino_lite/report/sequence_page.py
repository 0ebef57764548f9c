"""The report of a sequence: its stages on one page."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from dino_lite.overrides import unquote
from dino_lite.report.doubts import doubts
from dino_lite.report.markup import Markup, folded, join, listing, table, tag
from dino_lite.report.page import caveats, curves, document, settings, tiles, told_verdict
from dino_lite.report.story import Story, results_of
from dino_lite.report.thumbnails import BYTES, MATRIX, Picture, find_pictures, picture_figures
from dino_lite.report.worth import adaptation_section, worth_section
from dino_lite.runs.sequence_folder import STAGE_TITLES, SequenceFolder, stage_cells


def sequence_page(sequence: SequenceFolder, stories: list[Story], now: datetime) -> str:
    """Render a sequence and the stories of its stages as HTML."""
    known = sequence.read()
    entries = known["stages"]
    rows = [[*stage_cells(entry)] for entry in entries]
    share = BYTES // (len(stories) + 1)
    sections = [("stages", "Stages", table([*STAGE_TITLES], rows, numeric=4))]
    if matrix := _matrix(sequence, entries, share):
        sections.append(("matrix", "Accuracy after each stage", matrix))
    for story in stories:
        key = story.title.partition("/")[2].replace("/", "_")
        sections.append((key, story.title.partition("/")[2], _stage(story, share)))
    sections.append(("command", "Command", _command(known)))
    done = sum(entry["finished"] for entry in entries)
    state = "finished" if done == len(entries) else f"{done} of {len(entries)} stages finished"
    mark = tag("span", state, class_="done" if done == len(entries) else "on")
    head = join(
        tag("p", "dino_lite report ", mark, class_="over"),
        tag("h1", sequence.folder.name),
        tag("p", f"{known['command']}, {len(entries)} stages", class_="line"),
    )
    return document(sequence.folder.name, head, sections, Markup(), now)


def _stage(story: Story, share: int) -> Markup:
    """Everything known about a stage, as on a page of its own."""
    figures, unreadable = picture_figures(find_pictures(story.folder), share)
    warnings = doubts(story._replace(missing=[*story.missing, *unreadable]))
    results = results_of(story.results)
    parts = [
        told_verdict(story),
        tiles(story),
        caveats(warnings, story),
        adaptation_section(story.results.get("adaptation")),
        worth_section(results, story.folder) if results else Markup(),
        curves(story),
        tag("div", figures, class_="pictures") if figures else Markup(),
        folded("Settings", listing(settings(story)), tag("pre", story.config_text, tabindex=0)),
    ]
    return join(*(part for part in parts if part))


def _matrix(sequence: SequenceFolder, entries: list[dict[str, Any]], share: int) -> Markup:
    """The accuracies of the latest finished stage's history, its picture, and what follows."""
    found = [entry["results"]["history"] for entry in entries if "history" in entry["results"]]
    if not found:
        return Markup()
    last: Mapping[str, Any] = found[-1]
    rows = [
        [row, *("" if value is None else f"{value:.2f}" for value in values)]
        for row, values in zip(last["rows"], last["accuracy"], strict=True)
    ]
    numbers = {
        "Average accuracy": "average_accuracy",
        "Forgetting": "forgetting",
        "Backward transfer": "backward_transfer",
        "Forward transfer": "forward_transfer",
    }
    pairs = [(t, f"{last[key]:.2f}") for t, key in numbers.items() if last[key] is not None]
    path = sequence.folder / f"{MATRIX.name}.png"
    drawn = [Picture(path, MATRIX)] if path.is_file() else []
    figures, _ = picture_figures(drawn, share)
    picture = tag("div", figures, class_="pictures") if figures else Markup()
    told = "k-NN accuracy in percent; forgetting and transfer in points."
    matrix = table(["", *last["collections"]], rows)
    return join(tag("p", told, class_="note"), matrix, listing(pairs), picture)


def _command(known: dict[str, Any]) -> Markup:
    words = [unquote(word) for word in known["overrides"]]
    line = shlex.join(["dino-lite", known["command"], *words])
    told = "The same command goes on with this sequence; with another name=… it starts a new one."
    box = tag("div", tag("pre", line, tabindex=0, id="line"), class_="command")
    return join(box, tag("p", told, class_="note"))
