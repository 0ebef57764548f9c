"""`dino-lite compare`: evaluates several backbones and their baselines on the same images."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from dino_lite.config import Config, command, compose
from dino_lite.contracts import UserError
from dino_lite.data.roots import several
from dino_lite.distributed import rank
from dino_lite.eval.baselines import baselines_of
from dino_lite.eval.measure import beside, comparable, line, measure
from dino_lite.eval.results import amount, interval
from dino_lite.interrupts import interrupt, on_stop
from dino_lite.meter import named
from dino_lite.planning.checks import check_values
from dino_lite.report.terminal import print_comparison
from dino_lite.runs.checkpoint import Checkpoint, find_checkpoint
from dino_lite.runs.identity import absolute_paths
from dino_lite.runs.run import read_json, write_text
from dino_lite.runs.sequence_folder import title_of
from dino_lite.runs.subject import Subject, build_evaluations, open_subject, save_results
from dino_lite.wording import count


class Row(NamedTuple):
    """One line of the comparison; `checkpoint` is None for a baseline."""

    name: str
    checkpoint: str | None
    image_size: int | str
    results: dict[str, dict[str, Any]]  # by evaluation


def compare(*overrides: str) -> dict[str, Any]:
    """Compare as `dino-lite compare OVERRIDES` does; returns the content of out=FILE.json."""
    return run_compare(compose("compare", overrides))


def run_compare(config: Config) -> dict[str, Any]:
    """Evaluate, print the table, and merge the results of each checkpoint into its results.json."""
    config = check_values(absolute_paths(config), auto=False)
    evaluations = build_evaluations(config)
    out = None if config["out"] is None else Path(config["out"])
    if out is not None and out.suffix not in _WRITERS:
        raise UserError(f"out={out}: name a file that ends in {', '.join(_WRITERS)}.")
    subjects = open_subjects(config, evaluations)
    data = next(iter(subjects.values())).store.data.splits
    notes = [f"{name} was {other}" for name, s in subjects.items() if (other := elsewhere(s))]
    if rank() == 0:
        print("\n".join([f"on {data.name}", *notes]), flush=True)
    kept: list[str] = []
    try:
        with on_stop(interrupt):
            rows = measure_all(config, subjects, evaluations, kept)
    except KeyboardInterrupt:
        if rank() == 0:
            done = f"{', '.join(kept)} kept in results.json of each; " if kept else ""
            print(f"interrupted: {done}no table was made (the same command does that).", flush=True)
        raise
    told = {"data": data.name, "notes": notes, "rows": [row._asdict() for row in rows]}
    if rank() == 0:
        print_comparison(rows)
        if out is not None:
            write_text(out, _WRITERS[out.suffix](told))
            print(f"written to {out}")
    return told


def open_subjects(config: Config, evaluations: dict[str, Any]) -> dict[str, Subject]:
    """Open each checkpoint, by name, all with the data of the first."""
    asked = config["checkpoints"]
    parts = several(asked) or ([asked] if asked else [])
    if not parts:
        raise UserError("checkpoints= is missing: list those to compare, 'checkpoints=[A,B]'.")
    found = {find_checkpoint(str(part), config["runs_dir"]): str(part) for part in parts}
    short = {checkpoint: _short_name(checkpoint, part) for checkpoint, part in found.items()}
    often = Counter(short.values())
    subjects: dict[str, Subject] = {}
    data = None
    for checkpoint, name in short.items():
        subject = open_subject(config, checkpoint, evaluations, data)
        if subject.notes:
            print("\n".join(subject.notes), flush=True)
        subjects[name if often[name] == 1 else str(checkpoint)] = subject
        data = subject.data
    return subjects


def _short_name(checkpoint: Checkpoint, asked: str) -> str:
    """The name of a run (and of its checkpoint, unless it is the last), else what the user gave."""
    if checkpoint.run is None:
        return asked
    name, which = title_of(checkpoint.run), checkpoint.which
    return name if which == "last" else f"{name} ({which})"


def elsewhere(subject: Subject) -> str | None:
    """A note if a run was trained on other data than it is evaluated on, else None."""
    run = subject.checkpoint.run
    if run is None or not run.environment_file.is_file():
        return None
    data = read_json(run.environment_file)["data"]
    if data["digest"] == subject.store.data.splits.train.digest():
        return None
    return f"trained on other data: {data['name']}, {count(data['num_images'], 'image')}"


def measure_all(
    config: Config, subjects: dict[str, Subject], evaluations: dict[str, Any], kept: list[str]
) -> list[Row]:
    """Evaluate the checkpoints, and each distinct baseline once; baselines come last. Each result
    is saved, printed and appended to `kept` as soon as it is known.
    """
    rows: list[Row] = []
    known: dict[tuple[str, str], Row] = {}
    for name, subject in subjects.items():
        size = subject.store.data.preprocessing.pixels
        keep = partial(_keep, kept, name, subject)
        with named(name):
            results = measure(subject.backbone, subject.store, evaluations, keep)
        seed, data = int(config["seed"]), subject.store.data
        for baseline in baselines_of(subject.backbone, data, seed) if config["baselines"] else []:
            key = (baseline.title, baseline.key)
            if key not in known:
                with named(baseline.title):
                    found = measure(baseline.build(), subject.store, comparable(evaluations))
                known[key] = Row(f"{baseline.title}, as {name}", None, size, found)
            for which, found in known[key].results.items():
                results[which] = beside(results[which], baseline.title, found)
        rows.append(Row(name, str(subject.checkpoint), size, results))
        if rank() == 0:
            save_results(results, subject)
            print(f"written to {subject.checkpoint.results_file}")
    often = Counter(title for title, _ in known)
    alone = [
        row if often[title] > 1 else row._replace(name=title) for (title, _), row in known.items()
    ]
    return rows + alone


def _keep(kept: list[str], name: str, subject: Subject, which: str, found: dict[str, Any]) -> None:
    kept.append(f"{which} of {name}")
    if rank() == 0:
        save_results({which: found}, subject)
        print(line(f"{name}, {which}", found), flush=True)


def as_json(told: dict[str, Any]) -> str:
    """The comparison as JSON."""
    return json.dumps(told, indent=2) + "\n"


def as_csv(told: dict[str, Any]) -> str:
    """The comparison as CSV: one line per row and evaluation."""
    text = io.StringIO()
    writer = csv.writer(text)
    titles = ("name", "checkpoint", "data", "image_size", "evaluation", "metric", "value")
    writer.writerow([*titles, "low", "high", "unit", "num_train", "num_test"])
    for row in told["rows"]:
        for key, found in row["results"].items():
            writer.writerow(
                [
                    *(row["name"], row["checkpoint"] or "", told["data"], row["image_size"]),
                    *(key, found["metric"], found["value"]),
                    *(found["interval"] or ("", "")),
                    *(found["unit"], found["num_train"], found["num_test"]),
                ]
            )
    return text.getvalue()


def as_markdown(told: dict[str, Any]) -> str:
    """The comparison as a Markdown table."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    rows = told["rows"]
    first = rows[0]["results"]
    head = [told["data"], "pixels", *(f"{key}: {found['metric']}" for key, found in first.items())]
    lines = [line(head), line(["---", *["--:"] * (len(head) - 1)])]
    for row in rows:
        cells = [_cell(row["results"].get(key)) for key in first]
        lines.append(line([row["name"], str(row["image_size"]), *cells]))
    return "\n".join([*lines, *(f"\n{note}." for note in told["notes"])]) + "\n"


def _cell(found: dict[str, Any] | None) -> str:
    """A result with its interval; "" if a baseline was not measured."""
    if found is None:
        return ""
    return f"{amount(found)} ({interval(found)})" if found["interval"] else amount(found)


_WRITERS = {".json": as_json, ".csv": as_csv, ".md": as_markdown}


@command("compare")
def main(config: Config) -> None:
    """Command line."""
    run_compare(config)


if __name__ == "__main__":
    main()
