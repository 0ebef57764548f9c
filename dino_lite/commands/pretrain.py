"""`dino-lite pretrain`: trains a vision backbone on images without labels."""

from __future__ import annotations

from typing import Any

from dino_lite.config import Config, command, compose
from dino_lite.overrides import job_arguments, outside_hydra, quote_override
from dino_lite.planning.groups import Generations
from dino_lite.runs.generations import run_generations
from dino_lite.runs.pretraining import run_pretrain
from dino_lite.runs.trainer import as_command
from dino_lite.settings.validate import validated


def pretrain(*overrides: str) -> dict[str, Any]:
    """Train as `dino-lite pretrain OVERRIDES` does; returns the results of the run, with its folder
    as "run"; of several generations, the folder, the path of the last one and the results by stage.
    """
    config = compose("pretrain", overrides)
    return _run_as_command(config, [quote_override(override) for override in overrides])


def _run_as_command(config: Config, arguments: list[str]) -> dict[str, Any]:
    """Train; other processes are started as `dino-lite pretrain ARGUMENTS`."""
    several = validated(Generations, {"generations": config["generations"]})
    if several["generations"] > 1:
        return run_generations(config, arguments)
    with outside_hydra(), as_command("dino_lite.commands.pretrain", arguments):
        return run_pretrain(config)


@command("pretrain")
def main(config: Config) -> None:
    """Command line."""
    _run_as_command(config, job_arguments())


if __name__ == "__main__":
    main()
