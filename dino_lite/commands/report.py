"""`dino-lite report`: a run, or a backbone without one, told on one HTML page."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

from dino_lite.checkpoints import find_checkpoint, results_file, run_of
from dino_lite.checks import check_values
from dino_lite.commands.evaluate import draw_pictures, open_subject
from dino_lite.config import Config, command, compose, quote_override
from dino_lite.contracts import UserError
from dino_lite.eval.gallery import PICTURES
from dino_lite.report.page import page
from dino_lite.report.story import read_story
from dino_lite.runs import absolute_paths, write_text


def report(*overrides: str) -> Path:
    """Write the page as `dino-lite report OVERRIDES` does; returns where it lies."""
    return run_report(compose("report", overrides))


def run_report(config: Config) -> Path:
    """Write the page beside the results, or to `out`."""
    config = check_values(absolute_paths(config), auto=False)
    checkpoint = find_checkpoint(config["checkpoint"], config["runs_dir"])
    path = Path(config["out"] or _page_file(checkpoint)).absolute()
    missing = []
    if config["draw"]:
        try:
            _draw_missing(checkpoint, config["runs_dir"])
        except UserError as error:
            missing.append(f"Pictures of it could not be drawn: {error}")
    story = read_story(checkpoint)
    story = story._replace(missing=[*story.missing, *missing])
    write_text(path, page(story, datetime.now()))
    print(f"written to {path}")
    return path


def _page_file(checkpoint: Path) -> Path:
    """Beside results.json, and called as that is: report.html, NAME.report.html."""
    beside = results_file(checkpoint)
    return beside.with_name(f"{beside.name.removesuffix('results.json')}report.html")


def _draw_missing(checkpoint: Path, runs_dir: str) -> None:
    """Pictures that are not in the run's folder, or older than the checkpoint, on its own data."""
    run = run_of(checkpoint)
    if run is None:
        return
    made = checkpoint.stat().st_mtime
    files = {name: run.folder / f"{name}.png" for name in PICTURES}
    missing = {
        name: picture
        for name, picture in PICTURES.items()
        if not files[name].is_file() or files[name].stat().st_mtime < made
    }
    if missing:
        asked = [f"checkpoint={checkpoint}", f"runs_dir={runs_dir}"]
        config = compose("evaluate", [quote_override(each) for each in asked])
        draw_pictures(open_subject(config, {}), missing, run.folder)


@command("report")
def main(config: Config) -> None:
    """Command line."""
    run_report(config)


if __name__ == "__main__":
    main()
