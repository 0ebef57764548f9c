"""`dino-lite evaluate`: a frozen backbone, measured on a data set by every evaluation asked for."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dino_lite.checkpoints import (
    asked_data,
    find_checkpoint,
    open_backbone,
    open_data,
    results_file,
    run_of,
)
from dino_lite.checks import check_values
from dino_lite.commands.tables import print_results
from dino_lite.config import Config, command, compose, instantiate
from dino_lite.contracts import UserError
from dino_lite.data.clean import CleanData
from dino_lite.data.photometric import Normalize
from dino_lite.distributed import alone, rank, start_group
from dino_lite.eval.baselines import raw_pixels, untrained
from dino_lite.eval.gallery import PICTURES, Picture, draw_all
from dino_lite.eval.store import FeatureStore
from dino_lite.machine import pick_accelerator
from dino_lite.runs import absolute_paths, merge_json


class Subject(NamedTuple):
    """What is measured: a checkpoint's backbone, the data it is measured on (opened, and as it was
    asked for), and the name results of other data than its own carry ("@name"; else "").
    """

    checkpoint: Path
    backbone: Any
    store: FeatureStore
    data: Config
    suffix: str


class Baseline(NamedTuple):
    """What a subject is compared with; baselines of equal `key` have equal results."""

    title: str
    key: str
    build: Callable[[], Any]


def evaluate(*overrides: str) -> dict[str, Any]:
    """Measure as `dino-lite evaluate OVERRIDES` does; returns the results by evaluation."""
    return run_evaluate(compose("evaluate", overrides))


def run_evaluate(config: Config) -> dict[str, Any]:
    """Print all results and merge them into results.json beside the checkpoint."""
    config = check_values(absolute_paths(config), auto=False)
    evaluations = build_evaluations(config)
    subject = open_subject(config, evaluations)
    data = subject.store.data
    if rank() == 0:
        print(f"{subject.checkpoint} on {data.splits.name}, {data.size} pixels", flush=True)
    results = measure(subject.backbone, subject.store, evaluations)
    if config["baselines"]:
        others = comparable(evaluations)
        results = beside(
            results,
            {
                baseline.title: measure(baseline.build(), subject.store, others)
                for baseline in baselines_of(subject, int(config["seed"]))
            },
        )
    if rank() == 0:
        keep(results, subject)
        print_results({"": results})
    if config["pictures"] is not None:
        own = {name: each.draw for name, each in evaluations.items() if hasattr(each, "draw")}
        draw_pictures(subject, PICTURES | own, Path(config["pictures"]))
    return results


def build_evaluations(config: Config) -> dict[str, Any]:
    """What `eval` names, by name."""
    evaluations = {n: instantiate(node) for n, node in (config.get("eval") or {}).items()}
    if not evaluations:
        raise UserError("eval= names no evaluation: choose eval=knn.")
    return evaluations


def open_subject(
    config: Config, evaluations: Mapping[str, Any], data: Config | None = None
) -> Subject:
    """The backbone that `checkpoint` names on its device, and its features on `data`; none given:
    on what the configuration asks for.
    """
    accelerator = pick_accelerator(config["accelerator"], "accelerator")
    start_group(accelerator)
    checkpoint = find_checkpoint(config["checkpoint"], config["runs_dir"])
    backbone, about = open_backbone(checkpoint)
    for line in about.get("told", []) if rank() == 0 else []:
        print(line, flush=True)
    if data is None:
        data = asked_data(config, checkpoint, about)
    elif "channels" in data:
        data = data | {"channels": about["in_chans"]}
    splits = open_data(data, about)
    size = about["image_size"] if config["image_size"] == "auto" else config["image_size"]
    if not isinstance(size, int) or size < 1 or size % backbone.patch_size:
        raise UserError(
            f"image_size={size}: a multiple of the backbone's patch size "
            f"{backbone.patch_size} is needed."
        )
    normalize = Normalize(about["mean"], about["std"])
    images = CleanData(splits, size, normalize, config["batch_size"], config["num_workers"])
    backbone.to(torch.device(accelerator))
    folder = None if config["features_dir"] is None else Path(config["features_dir"])
    most = max((int(getattr(each, "num_blocks", 1)) for each in evaluations.values()), default=1)
    suffix = "" if data == about["data"] else f"@{splits.name}"
    suffix += "" if size == about["image_size"] else f"@{size}px"
    return Subject(checkpoint, backbone, FeatureStore(images, folder, most), data, suffix)


def comparable(evaluations: Mapping[str, Any]) -> dict[str, Any]:
    """Those whose number says something beside that of a baseline."""
    return {
        name: each for name, each in evaluations.items() if getattr(each, "has_baselines", True)
    }


def measure(
    backbone: Any, store: FeatureStore, evaluations: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """Each evaluation's result, with data, pixels, unreadable images and seconds."""
    results = {}
    for name, evaluation in evaluations.items():
        started, data = time.monotonic(), store.data
        found = evaluation(backbone, store)
        about = {"data": data.splits.name, "image_size": data.size, "unreadable": len(data.bad)}
        found = about | found  # one that brings its own images says so
        results[name] = found | {"seconds": round(time.monotonic() - started, 2)}
    return results


def baselines_of(subject: Subject, seed: int) -> list[Baseline]:
    """Raw pixels, and the subject's network untrained."""
    backbone, data = subject.backbone, subject.store.data
    scale = [*data.normalize.mean.tolist(), *data.normalize.std.tolist()]
    device = next(backbone.parameters()).device
    return [
        Baseline(
            "raw pixels",
            json.dumps([data.size, backbone.patch_size, backbone.in_chans]),
            lambda: raw_pixels(data, backbone.patch_size).to(device),
        ),
        Baseline(
            "untrained",
            json.dumps([backbone.spec, data.size, scale]),
            lambda: untrained(backbone, seed),
        ),
    ]


def beside(
    results: Mapping[str, dict[str, Any]], baselines: Mapping[str, Mapping[str, dict[str, Any]]]
) -> dict[str, dict[str, Any]]:
    """`results` with those of each baseline under "baselines", as far as they are compared."""
    return {
        name: found
        | {
            "baselines": {
                title: {key: others[name][key] for key in ("value", "interval")}
                for title, others in baselines.items()
                if name in others
            }
        }
        for name, found in results.items()
    }


def keep(results: Mapping[str, Any], subject: Subject) -> None:
    """Merge into results.json: under the checkpoint's name (last, best) where that is a run's."""
    checkpoint = subject.checkpoint
    own, path = subject.store.data.splits.name, results_file(checkpoint)
    named = {
        name + (subject.suffix if found["data"] == own else f"@{found['data']}"): found
        for name, found in results.items()
    }

    def merged(before: dict[str, Any]) -> dict[str, Any]:
        there = before.get(checkpoint.stem, {}) if run_of(checkpoint) else before
        for name, found in named.items():  # baselines measured before are not thrown away
            old = there.get(name, {})
            if "baselines" in old and old["protocol"] == found["protocol"]:
                found.setdefault("baselines", old["baselines"])
        return before | ({checkpoint.stem: there | named} if run_of(checkpoint) else named)

    merge_json(path, merged)
    print(f"written to {path}")


def draw_pictures(subject: Subject, pictures: Mapping[str, Picture], folder: Path) -> None:
    """Each of `pictures` as NAME.png, and say which were drawn."""
    for source in subject.store.data.splits[:2]:
        if source is not None:  # all ranks extract, whatever is kept already
            subject.store.pooled(subject.backbone, source)
    if rank() > 0:
        return
    with alone():
        drawn = draw_all(subject.backbone, subject.store, folder, pictures, print)
    print(f"drawn into {folder}: {', '.join(path.name for path in drawn.values())}")


@command("evaluate")
def main(config: Config) -> None:
    """Command line."""
    run_evaluate(config)


if __name__ == "__main__":
    main()
