"""`dino-lite export`: the teacher's backbone in other formats, each loaded again and compared on
real images.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from dino_lite.checkpoints import asked_data, find_checkpoint, open_backbone, open_data, run_of
from dino_lite.checks import check_values
from dino_lite.config import Config, command, compose, instantiate
from dino_lite.contracts import UserError
from dino_lite.data.clean import CleanData
from dino_lite.data.photometric import Normalize
from dino_lite.runs import absolute_paths

_NUM_IMAGES = 8  # of the check


def export(*overrides: str) -> dict[str, Any]:
    """Export as `dino-lite export OVERRIDES` does; returns what was written, by format."""
    return run_export(compose("export", overrides))


def run_export(config: Config) -> dict[str, Any]:
    """Write every format asked for, and print how far its tokens are from the teacher's."""
    config = check_values(absolute_paths(config), auto=False)
    checkpoint = find_checkpoint(config["checkpoint"], config["runs_dir"])
    run = run_of(checkpoint)
    if run is None and not config["out"]:
        raise UserError(f"{checkpoint} belongs to no run: name a folder to write to, out=FOLDER.")
    backbone, about = open_backbone(checkpoint)
    for line in about.get("told", []):
        print(line)
    splits = open_data(asked_data(config, checkpoint, about), about)
    normalize = Normalize(about["mean"], about["std"])
    data = CleanData(splits, about["image_size"], normalize, batch_size=_NUM_IMAGES)
    images, _ = next(data.batches(splits.train, torch.device("cpu")))  # one at least is readable
    written: dict[str, Any] = {}
    for name, node in config["format"].items():
        folder = Path(config["out"]).expanduser() if config["out"] else run.folder / "export"  # type: ignore[union-attr]
        written[name] = instantiate(node)(
            backbone,
            folder / name if len(config["format"]) > 1 or not config["out"] else folder,
            normalize_mean=about["mean"],
            normalize_std=about["std"],
            image_size=about["image_size"],
            card=about["card"] | {"checkpoint": checkpoint.name},
            images=images,
        )
        print(
            f"{name}: {written[name]['directory']} (largest difference of tokens on "
            f"{len(images)} images: "
            f"{written[name]['largest_difference']:.1e})"
        )
    return written


@command("export")
def main(config: Config) -> None:
    """Command line."""
    run_export(config)


if __name__ == "__main__":
    main()
