"""`dino-lite export`: writes the teacher's backbone in formats of other programs. Each is read back
without dino_lite, and compared on real images, before it takes its place.
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
from dino_lite.formats.format import Format
from dino_lite.formats.opened import Opened
from dino_lite.formats.publish import check_target, publish
from dino_lite.formats.verify import demand_packages
from dino_lite.machine import pick_accelerator
from dino_lite.planning.checks import check_values
from dino_lite.report.origin import training
from dino_lite.report.originals import to_export
from dino_lite.runs.checkpoint import Checkpoint, find_checkpoint, open_backbone
from dino_lite.runs.identity import absolute_paths
from dino_lite.runs.subject import asked_data, open_data
from dino_lite.wording import count

_MOST_FITTED, _BATCH = 10_000, 64  # training images that the principal components are taken of


def export(*overrides: str) -> dict[str, Any]:
    """Export as `dino-lite export OVERRIDES` does; returns what each format's export.json says,
    with "directory" and "largest_difference".
    """
    return run_export(compose("export", overrides))


def run_export(config: Config) -> dict[str, Any]:
    """Write all formats, and print how much their tokens differ from the teacher's.

    What can be refused before anything is written is. Later a format that cannot be written does
    not keep others from being written; UserError then names it at the end.
    """
    config = check_values(absolute_paths(config), auto=False)
    formats: dict[str, Format] = {n: instantiate(node) for n, node in config["format"].items()}
    if not formats:
        raise UserError("format=[]: name at least one format, as in format=[safetensors].")
    demand_packages(formats)
    checkpoint = find_checkpoint(config["checkpoint"], config["runs_dir"])
    targets = _targets(config, checkpoint, [*formats])
    for target in targets.values():
        check_target(target)
        _refuse_source(target, checkpoint)
    opened = open_backbone(checkpoint, config["trust"], config.get("checkpoint_layout"))
    for note in opened.notes:
        print(note)
    splits = open_data(asked_data(config, checkpoint, opened), opened)
    card = training(checkpoint, opened)
    if config["compact"] is not None:
        of = {"of": opened.backbone.embed_dim, "whiten": config["whiten"]}
        card |= {"compact": {"width": config["compact"]} | of, "results_of": of["of"]}
        opened = opened._replace(backbone=_compact(config, opened, splits))
    opened, original = to_export(opened, splits, card)
    written: dict[str, Any] = {}
    refused: dict[str, UserError] = {}
    for name, form in formats.items():
        try:
            found = publish(form, opened, targets[name], original, config["license"])
        except UserError as error:
            refused[name] = error
            continue
        written[name] = found
        print(f"{name}: {found['directory']} ({_differences(found)})", flush=True)
    if len(formats) == 1 and refused:
        raise next(iter(refused.values()))
    if refused:
        rest = f"{' and '.join(written)} written" if written else "nothing was written"
        told = "; ".join(
            str(error).rstrip(".") if str(error).startswith("format=") else f"{name}: {error}"
            for name, error in refused.items()
        ).rstrip(".")
        raise UserError(f"{count(len(refused), 'format')} failed, {rest}: {told}.")
    return written


def _differences(found: dict[str, Any]) -> str:
    """What the verification measured, on one line."""
    checked = found["verification"]
    pixels = checked["pixels"]
    levels, cls = (max(check[key] for check in pixels) for key in ("levels", "cls"))
    told = (
        f"largest difference of tokens on {count(checked['num_images'], 'image')}, of their root "
        f"mean square: {found['largest_difference']:.1e}; mean difference of pixels prepared by "
        f"the format: {levels:.2g} of 255 levels"
    )
    if cls:
        told += f", as the format crops or resizes otherwise: class tokens then differ by {cls:.2g}"
    return told


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


def _refuse_source(target: Path, checkpoint: Checkpoint) -> None:
    """Raise UserError if the weights to export are in the folder that would be replaced."""
    if checkpoint.path is None or not target.is_dir():
        return
    places = [checkpoint.path, checkpoint.path.resolve()]  # a cache of the Hub has links to files
    if any(target.samefile(each if each.is_dir() else each.parent) for each in places):
        raise UserError(
            f"{target} is the folder of checkpoint={checkpoint} itself, which an export would "
            "replace: name another folder as out=."
        )


def _targets(config: Config, checkpoint: Checkpoint, names: list[str]) -> dict[str, Path]:
    """The folder of each format: below `out`, which is that of a single one, else in the run."""
    suffix = ""
    if config["compact"] is not None:
        suffix = f"_{config['compact']}{'_whitened' if config['whiten'] else ''}"
    if config["out"]:
        out = Path(config["out"]).expanduser().absolute()
        if len(names) == 1:
            return {names[0]: out}
    elif checkpoint.run is None:
        raise UserError(f"{checkpoint} is not part of a run: give the folder to write, out=FOLDER.")
    else:
        out = checkpoint.run.folder / "export"
    return {name: out / f"{name}{suffix}" for name in names}


@command("export")
def main(config: Config) -> None:
    """Command line."""
    run_export(config)


if __name__ == "__main__":
    main()
