"""`dino-lite runs`: lists the runs in a folder with their state, accuracy, age and size."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from dino_lite.config import Config, command, compose
from dino_lite.errors import UserError
from dino_lite.runs.listing import Listed, list_runs
from dino_lite.runs.run import write_text

_TITLES = ("run", "state", "method", "backbone", "steps", "k-NN", "raw pixels", "untrained")
_RIGHT = ("steps", "k-NN", "raw pixels", "untrained", "age", "size")


def runs(*overrides: str) -> list[dict[str, Any]]:
    """List as `dino-lite runs OVERRIDES` does; returns the content of out=FILE.json."""
    return run_runs(compose("runs", overrides))


def run_runs(config: Config) -> list[dict[str, Any]]:
    """Print the runs, newest first, and write them to `out`."""
    out = None if config["out"] is None else Path(str(config["out"])).expanduser()
    if out is not None and out.suffix != ".json":
        raise UserError(f"out={out}: name a file that ends in .json.")
    folder = Path(str(config["runs_dir"])).expanduser()
    new = folder == Path("runs") and not folder.exists()  # before the first run
    listed = [] if new else list_runs(folder)
    if listed:
        print("\n".join(table(listed, time.time())))
    else:
        print(f"There is no run in {folder} yet: dino-lite pretrain FOLDER makes the first.")
    told = [run._asdict() for run in listed]
    if out is not None:
        write_text(out, json.dumps(told, indent=2) + "\n")
        print(f"written to {out}")
    return told


def table(listed: list[Listed], now: float) -> list[str]:
    """The runs as aligned lines below a line of titles; columns without any value are left out."""
    rows = [(*_TITLES, "age", "size"), *(cells(run, now) for run in listed)]
    columns = [column for column in zip(*rows, strict=True) if any(column[1:])]
    lines = []
    for row in zip(*columns, strict=True):
        parts = []
        for cell, column in zip(row, columns, strict=True):
            width = max(map(len, column))
            parts.append(f"{cell:>{width}}" if column[0] in _RIGHT else f"{cell:{width}}")
        lines.append("  ".join(parts).rstrip())
    return lines


def cells(run: Listed, now: float) -> tuple[str, ...]:
    """One run as text, in the order of the table."""
    about = "" if run.total is None or run.total == run.steps else f" of {run.total:,}"
    online = "" if run.knn_online is None else f"online {_percent(run.knn_online)}"
    return (
        *(run.name, run.state, run.method, run.backbone),
        f"{run.steps:,}{about}",
        online if run.knn is None else _percent(run.knn),
        _percent(run.knn_raw_pixels),
        _percent(run.knn_untrained),
        _age(now - run.changed),
        _size(run.num_bytes),
    )


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1f} %"


def _age(seconds: float) -> str:
    """Seconds as text: 40 s, 25 min, 31 h, 12 days."""
    for unit, name, most in ((1, "s", 100), (60, "min", 100), (3600, "h", 72)):
        if seconds < most * unit:
            return f"{max(seconds, 0) // unit:.0f} {name}"
    return f"{seconds // 86_400:.0f} days"


def _size(num_bytes: int) -> str:
    """Bytes as text: 7 B, 2.3 MB, 410 MB, 12 GB."""
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if num_bytes >= unit:
            return f"{num_bytes / unit:.{0 if num_bytes >= 10 * unit else 1}f} {name}"
    return f"{num_bytes} B"


@command("runs")
def main(config: Config) -> None:
    """Command line."""
    run_runs(config)


if __name__ == "__main__":
    main()
