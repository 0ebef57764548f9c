"""`dino-lite adapt`: trains existing weights on new images, and keeps what they knew."""

from __future__ import annotations

from typing import Any

from dino_lite.config import Config, command, compose
from dino_lite.overrides import job_arguments, quote_override
from dino_lite.planning.checks import check_values
from dino_lite.runs.adaptation import Adaptation
from dino_lite.runs.checkpoint import find_checkpoint
from dino_lite.runs.identity import absolute_paths
from dino_lite.runs.sequence import Sequence
from dino_lite.runs.trainer import check_launcher


def adapt(*overrides: str) -> dict[str, Any]:
    """Adapt as `dino-lite adapt OVERRIDES` does; returns the folder as "run", the path of the
    result, and what was measured after each stage.
    """
    config = compose("adapt", overrides)
    return run_adapt(config, [quote_override(override) for override in overrides])


def run_adapt(config: Config, arguments: list[str] | None = None) -> dict[str, Any]:
    """Adapt; other processes are started as `dino-lite adapt ARGUMENTS`."""
    config = check_values(absolute_paths(config))
    check_launcher(config)
    named = _resolved(config)
    config |= {"checkpoint": named}
    adaptation = Adaptation(config)
    kept = [word for word in arguments or [] if not word.startswith("checkpoint=")]
    words = [*kept, quote_override(f"checkpoint={named}")]
    source = "_".join(each.splits.name for each in adaptation.new)
    sequence = Sequence("adapt", config, source, words)
    return sequence.run(adaptation.stages(sequence))


def _resolved(config: Config) -> str:
    """The weights to start from by a name that means the same later and elsewhere."""
    start = find_checkpoint(config["checkpoint"], config["runs_dir"])
    if start.path is None:
        return start.name
    whole = start.run is not None and start.path == start.run.last
    return str((start.run.folder if whole and start.run else start.path).absolute())


@command("adapt")
def main(config: Config) -> None:
    """Command line."""
    run_adapt(config, job_arguments())


if __name__ == "__main__":
    main()
