"""`dino-lite embed`: writes the features of images to files; `dino_lite.embed` returns them."""

from __future__ import annotations

import json
import os
import time
from collections import namedtuple
from collections.abc import Iterable, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from dino_lite.config import Config, command
from dino_lite.contracts import Backbone, Interrupted, Source, Splits, Trust, UserError
from dino_lite.data.clean import CleanData
from dino_lite.data.given import Given, as_source
from dino_lite.data.names import safe_name
from dino_lite.data.roots import is_pattern, is_url, several
from dino_lite.data.sources import expand
from dino_lite.distributed import rank, start_group
from dino_lite.eval.embedder import Dtype, Embedder, Feature
from dino_lite.eval.feature_files import Part, check_installed
from dino_lite.eval.feature_parts import parts_of, tables, usual_part_images, write_parts
from dino_lite.eval.features import frozen
from dino_lite.eval.store import add_weights, file_stamps
from dino_lite.formats.opened import Opened
from dino_lite.interrupts import number_of
from dino_lite.machine import loader_workers, num_cores, pick_accelerator
from dino_lite.planning.checks import check_values
from dino_lite.runs.checkpoint import Checkpoint, find_checkpoint, open_backbone
from dino_lite.runs.feature_folder import FORMAT, FeatureFolder
from dino_lite.runs.identity import absolute_paths
from dino_lite.runs.subject import asked_data, open_data
from dino_lite.settings.kinds import Count, Size
from dino_lite.settings.validate import validated
from dino_lite.version import __version__
from dino_lite.wording import count


def embed(
    images: Given | Iterable[Any],
    checkpoint: str | Path,
    features: Feature | Sequence[Feature] = "cls",
    *,
    blocks: int | Sequence[int] = -1,
    unit_length: bool = False,
    dtype: Dtype = "float32",
    image_size: Size | Literal["auto"] = "auto",
    batch_size: Size = 64,
    num_workers: Count = 0,
    accelerator: str = "auto",
    trust: Trust = (),
    runs_dir: str | Path = "runs",
) -> Any:
    """Features of images: for one of `features` and one of `blocks` an array "n D" (of patches
    "n P D"), else a NamedTuple of `name`, a list, and such arrays: `cls`, `cls_block_3`, ….

    `images` is a path, a folder (or whatever else data.root may be), a PIL image, an array of uint8
    "H W C", or a list of them. The other settings are those of `dino-lite embed`. Raises UserError
    for an image that cannot be read.
    """
    given = {
        **{"features": features, "blocks": blocks, "unit_length": unit_length, "dtype": dtype},
        **{"image_size": image_size, "batch_size": batch_size, "num_workers": num_workers},
    }
    validated(embed, given, num_given=None)
    opened = open_backbone(find_checkpoint(str(checkpoint), runs_dir), trust)
    source = as_source(images, opened.backbone.in_chans)
    opened.backbone.to(torch.device(pick_accelerator(accelerator, "accelerator")))
    splits = Splits(source, None, "images")
    data = CleanData(splits, opened.at(image_size), batch_size, num_workers)
    embedder = Embedder(
        opened.backbone, data.preprocessing.size, features, blocks, unit_length, dtype
    )
    whole = Part("train", 0, 1, 0, len(source))
    with frozen(opened.backbone):
        ((_, table),) = tables(embedder, data, "train", source, [whole])
    for name, why in data.bad.items():
        raise UserError(
            f"{name} cannot be read ({why}): leave it out, or use `dino-lite embed`, which skips "
            "and lists such images."
        )
    if isinstance(features, str) and isinstance(blocks, int):
        return table.features[embedder.columns[0].name]
    return namedtuple("Features", ["name", *table.features])(table.name, **table.features)


def run_embed(config: Config) -> Path:
    """Write the features; returns the folder."""
    config = check_values(absolute_paths(config), auto=False)
    check_installed(config["file_format"])
    checkpoint = find_checkpoint(config["checkpoint"], config["runs_dir"])
    accelerator = pick_accelerator(config["accelerator"], "accelerator")
    start_group(accelerator)
    opened = open_backbone(checkpoint, config["trust"], config["checkpoint_layout"])
    asked = asked_data(config, checkpoint, opened)
    if config["out"]:
        _refuse_inside(Path(config["out"]), asked.get("root"))
    splits = open_data(asked, opened)
    sources = _sources(splits, config["splits"])
    workers = loader_workers(config["num_workers"], accelerator)
    if accelerator == "cpu" and workers and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, num_cores() - workers))
    opened.backbone.to(torch.device(accelerator))
    data = CleanData(splits, opened.at(config["image_size"]), config["batch_size"], workers)
    embedder = Embedder(
        opened.backbone,
        data.preprocessing.size,
        config["features"],
        config["blocks"],
        config["unit_length"],
        config["dtype"],
        str(config["precision"]) == "bf16",
    )
    folder = FeatureFolder(_folder(config, checkpoint, splits), config["file_format"])
    size = config["part_images"]
    size = usual_part_images(embedder.image_bytes) if size == "auto" else size
    parts = parts_of(sources, size)
    about = _about(config, checkpoint, opened, data, embedder, sources, parts, size)
    if rank() == 0:
        names = ", ".join(column.name for column in embedder.columns)
        rows, columns = data.preprocessing.size
        title = f"{names} of {checkpoint} on {splits.name}, {rows}x{columns} pixels"
        print("\n".join([*opened.notes, title]), flush=True)
    with folder.begun(about):
        missing = folder.missing(parts)
        if rank() == 0 and 0 < len(missing) < len(parts):
            print(f"{len(parts) - len(missing):,} of {count(len(parts), 'part')} are there already")
        started = time.monotonic()
        try:
            write_parts(embedder, data, sources, missing, folder.write)
        except KeyboardInterrupt as error:
            done = sum(folder.path(part).exists() for part in parts)
            raise Interrupted(
                f"interrupted: {done:,} of {count(len(parts), 'part')} are in {folder.folder}; the "
                "same command goes on after them.",
                number_of(error),
            ) from error
        if rank() == 0:
            num_bad = folder.finish(about, parts)
            seconds = time.monotonic() - started
            print(_told(folder.folder, parts, missing, num_bad, seconds), flush=True)
    return folder.folder


def _told(
    folder: Path, parts: list[Part], missing: list[Part], num_bad: int, seconds: float
) -> str:
    """What was written, in one line."""
    whole, num = (sum(part.stop - part.start for part in some) for some in (parts, missing))
    told = f"{count(whole - num_bad, 'image')}, {count(len(parts), 'part')} in {folder}"
    if num_bad:
        told += f"; {count(num_bad, 'image')} could not be read (bad_files.csv)"
    if not missing:
        return f"finished already: {told}"
    return f"{told} ({num / max(seconds, 1e-9):,.0f} images/s)"


def _sources(splits: Splits, asked: Literal["all", "train", "test"]) -> dict[str, Source]:
    """The splits to embed, by name."""
    found = {"train": splits.train} | ({} if splits.test is None else {"test": splits.test})
    if asked == "all":
        return found
    if asked not in found:
        raise UserError(f"splits={asked}: {splits.name} has one split only; leave splits out.")
    return {asked: found[asked]}


def _folder(config: Config, checkpoint: Checkpoint, splits: Splits) -> Path:
    """The folder to write to: `out`, else a folder in the run."""
    if config["out"]:
        return Path(config["out"])
    if checkpoint.run is None:
        raise UserError(f"{checkpoint} is not part of a run: give the folder to write, out=FOLDER.")
    return checkpoint.run.folder / "features" / safe_name(splits.name)


def _refuse_inside(out: Path, root: Any) -> None:
    """Raise UserError if `out` lies in a folder of images, as whose class it would count."""
    places = {Path(os.path.abspath(out)), out.resolve()}
    above = {folder for place in places for folder in place.parents}
    for each in several(root) or [root]:
        if not each or is_url(each):
            continue
        folder = expand(each)
        if is_pattern(each):
            inside = any(place.match(str(folder)) for place in places | above)
        else:
            inside = not above.isdisjoint({Path(os.path.abspath(folder)), folder.resolve()})
        if inside:
            raise UserError(
                f"out={out} lies in data.root={each}, so its files would be read as images by the "
                "next command: name a folder outside."
            )


def _about(
    config: Config,
    checkpoint: Checkpoint,
    opened: Opened,
    data: CleanData,
    embedder: Embedder,
    sources: dict[str, Source],
    parts: list[Part],
    part_images: int,
) -> dict[str, Any]:
    """The content of meta.json: plain JSON, the same for the same features."""
    return {
        "format": FORMAT,
        "version": __version__,
        "checkpoint": str(checkpoint),
        "weights": _weights_digest(opened.backbone),
        "preprocessing": data.preprocessing._asdict(),
        "features": embedder.about(),
        "dtype": config["dtype"],
        "unit_length": config["unit_length"],
        "precision": str(config["precision"]),
        "file_format": config["file_format"],
        "part_images": part_images,
        "data": data.splits.name,
        "labels_from": data.splits.labels_from,
        "splits": {
            split: {
                "images": len(source),
                "parts": sum(part.split == split for part in parts),
                "classes": [*map(str, source.classes)],
                "digest": _data_digest(source),
            }
            for split, source in sources.items()
        },
        "finished": False,
    }


def _weights_digest(backbone: Backbone) -> str:
    """32 hex digits over a backbone's structure and weights."""
    total = blake2b(json.dumps(backbone.stored_spec()).encode(), digest_size=16)
    add_weights(total, backbone)
    return total.hexdigest()


def _data_digest(source: Source) -> str:
    """32 hex digits over what is read: names, labels, files and how they become pixels."""
    first = source.name(0) if len(source) else ""
    about = [source.digest(), first, source.channels, source.pixels]
    total = blake2b(json.dumps(about).encode(), digest_size=16)
    total.update(b"" if source.labels is None else np.asarray(source.labels).tobytes())
    total.update(file_stamps(source))
    return total.hexdigest()


@command("embed")
def main(config: Config) -> None:
    """Command line."""
    run_embed(config)


if __name__ == "__main__":
    main()
