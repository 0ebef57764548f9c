"""`dino-lite report`: writes an HTML page about a run, or about a backbone without one."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

from dino_lite.config import Config, command, compose
from dino_lite.contracts import UserError
from dino_lite.eval.gallery import PICTURES, draw_all
from dino_lite.overrides import quote_override
from dino_lite.planning.checks import check_values
from dino_lite.report.page import page
from dino_lite.report.sequence_page import sequence_page
from dino_lite.report.story import Story, read_story
from dino_lite.runs.checkpoint import Checkpoint, find_checkpoint
from dino_lite.runs.identity import absolute_paths
from dino_lite.runs.run import write_text
from dino_lite.runs.sequence_folder import SequenceFolder, find_sequence, sequence_above
from dino_lite.runs.subject import open_subject


def report(*overrides: str) -> Path:
    """Write the page as `dino-lite report OVERRIDES` does; returns its path."""
    return run_report(compose("report", overrides))


def run_report(config: Config) -> Path:
    """Write the page next to the results, or to `out`."""
    config = check_values(absolute_paths(config), auto=False)
    if (sequence := find_sequence(_named(config), config["runs_dir"])) is not None:
        return _report_sequence(sequence, config)
    checkpoint = find_checkpoint(config["checkpoint"], config["runs_dir"])
    path = Path(config["out"] or _page_file(checkpoint)).absolute()
    write_text(path, page(_story(checkpoint, config), datetime.now()))
    print(f"written to {path}")
    return path


def _named(config: Config) -> str | None:
    """What the user named: for "latest", the sequence whose result that is, if it is one."""
    asked: str | None = config["checkpoint"]
    if asked != "latest":
        return asked
    run = find_checkpoint(asked, config["runs_dir"]).run
    above = None if run is None else sequence_above(run)
    return asked if above is None else str(above.folder)


def _report_sequence(sequence: SequenceFolder, config: Config) -> Path:
    """Write the page of all stages that have a checkpoint."""
    path = Path(config["out"] or sequence.folder / "report.html").absolute()
    runs = [run for run in sequence.runs() if run.last.is_file()]
    stories = [_story(find_checkpoint(str(run.last), config["runs_dir"]), config) for run in runs]
    write_text(path, sequence_page(sequence, stories, datetime.now()))
    print(f"written to {path}")
    return path


def _story(checkpoint: Checkpoint, config: Config) -> Story:
    """What is known about a checkpoint; pictures that are missing are drawn."""
    missing = []
    if config["draw"]:
        try:
            _draw_missing(checkpoint, config)
        except UserError as error:
            missing.append(f"Pictures could not be drawn: {error}")
    story = read_story(checkpoint, config["trust"], config["checkpoint_layout"])
    return story._replace(missing=[*story.missing, *missing])


def _page_file(checkpoint: Checkpoint) -> Path:
    """The page next to results.json, named after it: report.html, NAME.report.html."""
    beside = checkpoint.results_file
    return beside.with_name(f"{beside.name.removesuffix('results.json')}report.html")


def _draw_missing(checkpoint: Checkpoint, asked: Config) -> None:
    """Draw the pictures that are missing in a run or older than its checkpoint, from its data."""
    if checkpoint.run is None or checkpoint.path is None:
        return
    folder, saved = checkpoint.run.folder, checkpoint.path.stat().st_mtime
    files = {name: folder / f"{name}.png" for name in PICTURES}
    missing = {
        name: picture
        for name, picture in PICTURES.items()
        if not files[name].is_file() or files[name].stat().st_mtime < saved
    }
    if missing:
        config = compose("evaluate", [quote_override(f"runs_dir={asked['runs_dir']}")])
        subject = open_subject(
            config | {key: asked[key] for key in ("trust", "checkpoint_layout")}, checkpoint, {}
        )
        drawn = draw_all(subject.backbone, subject.store, folder, missing, print)
        print(f"drawn into {folder}: {', '.join(path.name for path in drawn.values())}")


@command("report")
def main(config: Config) -> None:
    """Command line."""
    run_report(config)


if __name__ == "__main__":
    main()
