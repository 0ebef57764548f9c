"""`dino-lite report`: a run, or a backbone without one, told on one HTML page."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

from dino_lite.checkpoints import find_checkpoint, results_file
from dino_lite.config import Config, command, compose
from dino_lite.report.page import page
from dino_lite.report.story import read_story
from dino_lite.runs import absolute_paths, write_text


def report(*overrides: str) -> Path:
    """Write the page as `dino-lite report OVERRIDES` does; returns where it lies."""
    return run_report(compose("report", overrides))


def run_report(config: Config) -> Path:
    """Write the page beside the results, or to `out`."""
    config = absolute_paths(config)
    checkpoint = find_checkpoint(config["checkpoint"], config["runs_dir"])
    where = config["out"] or results_file(checkpoint).with_name("report.html")
    path = Path(where).absolute()
    write_text(path, page(read_story(checkpoint), datetime.now()))
    print(f"written to {path}")
    return path


@command("report")
def main(config: Config) -> None:
    """Command line."""
    run_report(config)


if __name__ == "__main__":
    main()
