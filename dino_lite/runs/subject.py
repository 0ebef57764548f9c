"""Opens a checkpoint together with the data it is evaluated on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dino_lite.config import Config, instantiate
from dino_lite.contracts import Backbone, Evaluation, Splits, UserError
from dino_lite.data.clean import CleanData
from dino_lite.data.facts import first_readable
from dino_lite.distributed import rank, start_group
from dino_lite.eval.store import FeatureStore
from dino_lite.formats.opened import Opened
from dino_lite.machine import loader_workers, pick_accelerator
from dino_lite.planning.plan import open_splits
from dino_lite.runs.checkpoint import Checkpoint, open_backbone
from dino_lite.runs.run import merge_json
from dino_lite.runs.trust import demand_trust, targets
from dino_lite.wording import count


class Subject(NamedTuple):
    """What is evaluated: the backbone of a checkpoint and its features on a data set.

    `data` is the configuration of that data set. `suffix` is appended to the names of results if
    data or image size differ from the run's ("@name", "@64px"; else "").
    """

    checkpoint: Checkpoint
    backbone: Backbone
    store: FeatureStore
    data: Config
    suffix: str
    notes: tuple[str, ...]  # how third-party weights were matched


def open_subject(
    config: Config,
    checkpoint: Checkpoint,
    evaluations: Mapping[str, Evaluation],
    data: Config | None = None,
) -> Subject:
    """Open the backbone that `checkpoint` names, on the device, with `data` (default: the data
    given in the configuration, or the run's own).
    """
    accelerator = pick_accelerator(config["accelerator"], "accelerator")
    start_group(accelerator)
    opened = open_backbone(checkpoint, config["trust"], config.get("checkpoint_layout"))
    backbone = opened.backbone
    if data is None:
        data = asked_data(config, checkpoint, opened)
    elif "channels" in data:
        data = data | {"channels": backbone.in_chans}
    splits = open_data(data, opened)
    preprocessing = opened.at(config["image_size"])
    num_workers = loader_workers(config["num_workers"], accelerator)
    images = CleanData(splits, preprocessing, config["batch_size"], num_workers)
    backbone.to(torch.device(accelerator))
    folder = None if config["features_dir"] is None else Path(config["features_dir"])
    num_blocks = max((each.num_blocks for each in evaluations.values()), default=1)
    suffix = "" if data == opened.data else f"@{splits.name}"
    suffix += "" if preprocessing == opened.preprocessing else f"@{config['image_size']}px"
    store = FeatureStore(images, folder, num_blocks)
    return Subject(checkpoint, backbone, store, data, suffix, opened.notes if rank() == 0 else ())


def build_evaluations(config: Config) -> dict[str, Evaluation]:
    """Build the evaluations listed in `eval`, by name."""
    evaluations = {n: instantiate(node) for n, node in (config.get("eval") or {}).items()}
    for name, each in evaluations.items():
        if not isinstance(each, Evaluation):
            raise UserError(
                f"eval.{name}: {type(each).__qualname__} must derive from "
                "dino_lite.contracts.Evaluation."
            )
    if not evaluations:
        raise UserError("eval= lists no evaluation: choose one, as in eval=knn.")
    return evaluations


def asked_data(config: Config, checkpoint: Checkpoint, opened: Opened) -> Config:
    """The data configuration given by the user, else the run's own. How images become pixels is as
    in the run, if not said otherwise.
    """
    asked: Config = config["data"]
    if asked.get("root") is None and asked["_target_"].endswith(".open_auto"):
        if opened.data is None:
            raise UserError(
                f"{checkpoint} does not record its training data: give data.root=, or data=shapes."
            )
        demand_trust(targets(opened.data), config["trust"], checkpoint)
        return dict(opened.data)
    own = opened.data or {}
    pixels = {key: own[key] for key in ("range", "background") if key in asked and own.get(key)}
    asked = asked | {key: value for key, value in pixels.items() if asked[key] is None}
    if asked.get("channels") == 3:  # the default
        return asked | {"channels": opened.backbone.in_chans}
    return asked


def open_data(asked: Config, opened: Opened) -> Splits:
    """Open the data. Raises UserError if its number of channels differs from the backbone's."""
    splits = open_splits(asked)
    found, in_chans = first_readable(splits.train).shape[2], opened.backbone.in_chans
    if found != in_chans:
        raise UserError(
            f"The images of {splits.name} have {count(found, 'channel')}, but the backbone takes "
            f"{in_chans}: remove data.channels, or choose other data."
        )
    return splits


def save_results(results: Mapping[str, Any], subject: Subject) -> None:
    """Merge `results` into the checkpoint's results.json; for a run, under "last" or "best"."""
    checkpoint, own = subject.checkpoint, subject.store.data.splits.name
    named = {
        name + (subject.suffix if result["data"] == own else f"@{result['data']}"): result
        for name, result in results.items()
    }

    def merged(before: dict[str, Any]) -> dict[str, Any]:
        existing = before if checkpoint.which is None else before.get(checkpoint.which, {})
        for name, result in named.items():  # keep baselines that were measured earlier
            old = existing.get(name, {})
            if "baselines" in old and old["protocol"] == result["protocol"]:
                result.setdefault("baselines", old["baselines"])
        if checkpoint.which is None:
            return before | named
        return before | {checkpoint.which: existing | named}

    merge_json(checkpoint.results_file, merged)
