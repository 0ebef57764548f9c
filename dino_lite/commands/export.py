"""`dino-lite export`: writes the teacher's backbone in other formats, then loads each file and
compares its outputs on real images.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from dino_lite.config import Config, command, compose, instantiate
from dino_lite.contracts import UserError
from dino_lite.data.clean import CleanData
from dino_lite.data.photometric import Normalize
from dino_lite.data.wording import count
from dino_lite.planning.checks import check_values
from dino_lite.runs.checkpoint import Checkpoint, find_checkpoint, open_backbone
from dino_lite.runs.identity import absolute_paths
from dino_lite.runs.subject import asked_data, open_data

_NUM_IMAGES = 8  # for the comparison


def export(*overrides: str) -> dict[str, Any]:
    """Export as `dino-lite export OVERRIDES` does; returns folder and largest error by format."""
    return run_export(compose("export", overrides))


def run_export(config: Config) -> dict[str, Any]:
    """Write all formats, and print how much their tokens differ from the teacher's."""
    config = check_values(absolute_paths(config), auto=False)
    checkpoint = find_checkpoint(config["checkpoint"], config["runs_dir"])
    folder = _folder(config, checkpoint)
    opened = open_backbone(checkpoint, config["trust"])
    for note in opened.notes:
        print(note)
    splits = open_data(asked_data(config, checkpoint, opened), opened)
    normalize = Normalize(opened.mean, opened.std)
    data = CleanData(splits, opened.image_size, normalize, batch_size=_NUM_IMAGES)
    images, _ = next(data.batches(splits.train, torch.device("cpu")))  # at least one is readable
    written: dict[str, Any] = {}
    for name, node in config["format"].items():
        written[name] = instantiate(node)(
            opened.backbone,
            folder / name if len(config["format"]) > 1 or not config["out"] else folder,
            normalize_mean=opened.mean,
            normalize_std=opened.std,
            image_size=opened.image_size,
            card=opened.card | {"checkpoint": checkpoint.title},
            images=images,
        )
        print(
            f"{name}: {written[name]['directory']} (largest difference of tokens on "
            f"{count(len(images), 'image')}: "
            f"{written[name]['largest_difference']:.1e})"
        )
    return written


def _folder(config: Config, checkpoint: Checkpoint) -> Path:
    """The folder to write to: `out`, else a folder in the run."""
    if config["out"]:
        return Path(config["out"]).expanduser()
    if checkpoint.run is None:
        raise UserError(f"{checkpoint} is not part of a run: give the folder to write, out=FOLDER.")
    return checkpoint.run.folder / "export"


@command("export")
def main(config: Config) -> None:
    """Command line."""
    run_export(config)


if __name__ == "__main__":
    main()
