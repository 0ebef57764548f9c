"""`dino-lite export`: writes the teacher's backbone in other formats, then loads each file and
compares its outputs on real images.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from dino_lite.backbones.compact import Compact, compacted
from dino_lite.config import Config, command, compose, instantiate
from dino_lite.contracts import Splits, UserError
from dino_lite.data.clean import CleanData
from dino_lite.data.subset import Subset, spread
from dino_lite.eval.features import extract
from dino_lite.formats.opened import Opened
from dino_lite.machine import pick_accelerator
from dino_lite.planning.checks import check_values
from dino_lite.runs.checkpoint import Checkpoint, find_checkpoint, open_backbone
from dino_lite.runs.identity import absolute_paths
from dino_lite.runs.subject import asked_data, open_data
from dino_lite.wording import count

_NUM_IMAGES = 8  # for the comparison
_MOST_FITTED, _BATCH = 10_000, 64  # training images that the principal components are taken of


def export(*overrides: str) -> dict[str, Any]:
    """Export as `dino-lite export OVERRIDES` does; returns folder and largest error by format."""
    return run_export(compose("export", overrides))


def run_export(config: Config) -> dict[str, Any]:
    """Write all formats, and print how much their tokens differ from the teacher's."""
    config = check_values(absolute_paths(config), auto=False)
    checkpoint = find_checkpoint(config["checkpoint"], config["runs_dir"])
    folder = _folder(config, checkpoint)
    opened = open_backbone(checkpoint, config["trust"], config.get("checkpoint_layout"))
    for note in opened.notes:
        print(note)
    splits = open_data(asked_data(config, checkpoint, opened), opened)
    data = CleanData(splits, opened.preprocessing, batch_size=_NUM_IMAGES)
    images, _ = next(data.batches(splits.train, torch.device("cpu")))  # at least one is readable
    backbone, suffix = opened.backbone, ""
    if config["compact"] is not None:
        backbone = _compact(config, opened, splits)
        suffix = f"_{config['compact']}{'_whitened' if config['whiten'] else ''}"
    beside = len(config["format"]) > 1 or not config["out"]
    written: dict[str, Any] = {}
    for name, node in config["format"].items():
        written[name] = instantiate(node)(
            backbone,
            folder / f"{name}{suffix}" if beside else folder,
            normalize_mean=opened.mean,
            normalize_std=opened.std,
            image_size=opened.image_size,
            preprocessing=opened.preprocessing,
            card=opened.card | {"checkpoint": checkpoint.title},
            images=images,
        )
        print(
            f"{name}: {written[name]['directory']} (largest difference of tokens on "
            f"{count(len(images), 'image')}: "
            f"{written[name]['largest_difference']:.1e})"
        )
    return written


def _compact(config: Config, opened: Opened, splits: Splits) -> Compact:
    """The backbone with a reduced class token, fitted to at most `_MOST_FITTED` training images."""
    width, whole = config["compact"], opened.backbone
    if isinstance(width, bool) or not isinstance(width, int) or not 1 <= width < whole.embed_dim:
        raise UserError(
            f"compact={width}: it must be an integer from 1 to {whole.embed_dim - 1:,}, since the "
            f"class token has {whole.embed_dim:,} numbers."
        )
    if isinstance(whole, Compact):
        raise UserError("compact= is for a whole backbone, and this export is compact already.")
    some = Subset(splits.train, spread(len(splits.train), _MOST_FITTED))
    data = CleanData(splits, opened.preprocessing, _BATCH)
    device = torch.device(pick_accelerator("auto", "accelerator"))
    features = extract(whole.to(device), data, some, device, "features").features
    return compacted(whole.to("cpu"), features, width, bool(config["whiten"]))


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
