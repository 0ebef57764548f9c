"""`dino-lite evaluate`: a frozen backbone, measured on a data set by every evaluation asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from dino_lite.config import Config, command, compose, instantiate
from dino_lite.contracts import UserError
from dino_lite.data.clean import CleanData
from dino_lite.data.photometric import Normalize
from dino_lite.machine import pick_accelerator
from dino_lite.runs import (
    absolute_paths,
    find_checkpoint,
    open_backbone,
    open_data,
    read_json,
    results_file,
    write_json,
)


def evaluate(*overrides: str) -> dict[str, Any]:
    """Measure as `dino-lite evaluate OVERRIDES` does; returns the results by evaluation."""
    return run_evaluate(compose("evaluate", overrides))


def run_evaluate(config: Config) -> dict[str, Any]:
    """Print each result and merge all of them into results.json beside the checkpoint."""
    config = absolute_paths(config)
    evaluations = {name: instantiate(node) for name, node in (config.get("eval") or {}).items()}
    if not evaluations:
        raise UserError("eval= names no evaluation: choose eval=knn.")
    checkpoint = find_checkpoint(config["checkpoint"], config["runs_dir"])
    backbone, about = open_backbone(checkpoint)
    splits = open_data(config, checkpoint, about)
    size = about["image_size"] if config["image_size"] == "auto" else config["image_size"]
    if not isinstance(size, int) or size < 1 or size % backbone.patch_size:
        raise UserError(
            f"image_size={size}: a multiple of the backbone's patch size "
            f"{backbone.patch_size} is needed."
        )
    data = CleanData(
        splits,
        size,
        Normalize(about["mean"], about["std"]),
        config["batch_size"],
        config["num_workers"],
    )
    backbone.to(torch.device(pick_accelerator(config["accelerator"], "accelerator")))
    print(f"{checkpoint} on {splits.name}, {size} pixels")
    results: dict[str, Any] = {}
    for name, evaluation in evaluations.items():
        results[name] = evaluation(backbone, data) | {"data": splits.name, "image_size": size}
        results[name]["unreadable"] = len(data.bad)
        print(describe(name, results[name]))
    keep(results, checkpoint)
    return results


def describe(name: str, result: dict[str, Any]) -> str:
    """A result as lines of text."""
    rows = [f"{name}: {result['protocol']}"]
    if result["unreadable"]:
        rows.append(f"  {result['unreadable']} images could not be read and are left out")
    for k, accuracy in result.get("k", {}).items():
        rows.append(f"  k={k:>4}  top-1 {accuracy['top1']:6.2f} %  top-5 {accuracy['top5']:6.2f} %")
    return "\n".join(rows)


def keep(results: dict[str, Any], checkpoint: Path) -> None:
    """Merge into results.json: under the checkpoint's name (last, best) in a run, at the top of an
    export.
    """
    path = results_file(checkpoint)
    before = read_json(path) if path.is_file() else {}
    if checkpoint.is_file():
        results = {checkpoint.stem: before.get(checkpoint.stem, {}) | results}
    write_json(path, before | results)
    print(f"written to {path}")


@command("evaluate")
def main(config: Config) -> None:
    """Command line."""
    run_evaluate(config)


if __name__ == "__main__":
    main()
