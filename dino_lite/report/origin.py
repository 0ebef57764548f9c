"""What a model card tells of a checkpoint: its data, length and results, and the weights that it
began with, with their licenses.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from dino_lite.config import Config, load
from dino_lite.contracts import UserError
from dino_lite.formats.opened import Opened
from dino_lite.formats.portable import last_part
from dino_lite.formats.tensors import WEIGHTS, read_about, weights_file
from dino_lite.formats.timm_told import published
from dino_lite.report.story import results_of
from dino_lite.runs.checkpoint import Checkpoint, find_checkpoint
from dino_lite.runs.run import read_json

_TOLD = ("metric", "value", "unit", "interval", "protocol", "num_train", "num_test")


def training(checkpoint: Checkpoint, opened: Opened) -> dict[str, Any]:
    """The card of `opened` with what the folder of its run or export says besides. Plain JSON."""
    card = opened.card | {"checkpoint": checkpoint.title}
    run, config = checkpoint.run, opened.card.get("config")
    if run is not None and config is not None:
        card["images_seen"] = card["steps"] * config["loader"]["batch_size"]
        card["start"] = _starts(config, checkpoint.name)
        if teacher := config.get("teacher"):
            card["teacher"] = _teacher(teacher["checkpoint"]) | {"digest": teacher["digest"]}
        if run.environment_file.is_file():
            card["data"] = read_json(run.environment_file).get("data")
    elif checkpoint.kind != "export":
        rights = license_beside(checkpoint.path)
        if checkpoint.kind == "timm":
            rights = published(checkpoint.name.removeprefix("timm:")).get("license") or rights
        card["start"] = [{"name": checkpoint.title, "license": rights}]
    if checkpoint.results_file.is_file():
        card["results"] = _results(read_json(checkpoint.results_file), checkpoint.which)
        card.pop("results_of", None)  # those of the whole network, if this is a compact export
    return card


def _teacher(asked: str) -> dict[str, str]:
    """Name and license of a frozen teacher; of a file in a folder that holds only one, its."""
    if asked.startswith("timm:"):
        rights = published(asked.removeprefix("timm:")).get("license")
        return {"name": asked, "license": str(rights or "unknown")}
    path = Path(asked)
    name = path.parent if path.name in WEIGHTS else path
    return {"name": last_part(name), "license": license_beside(path)}


def _results(results: dict[str, Any], which: str | None) -> list[dict[str, Any]]:
    """The results of the checkpoint `which` ("last", "best") in a results.json."""
    kept = []
    for each in results_of(results):
        if each.checkpoint in ("", which):
            told = {key: each.found.get(key) for key in _TOLD}
            baselines = {
                title: {"value": found["value"]}
                for title, found in (each.found.get("baselines") or {}).items()
            }
            kept.append({"name": each.name} | told | {"baselines": baselines})
    return kept


def _starts(config: Config, name: str) -> list[dict[str, str]]:
    """The weights that a run began with, then those that they began with, and so on."""
    if start := config["backbone"].get("pretrained"):
        return [{"name": last_part(start), "license": license_beside(Path(start))}]
    if not (start := config.get("checkpoint")):
        return []
    found = [{"name": last_part(start), "license": "unknown"}]
    try:
        before = find_checkpoint(start, config["runs_dir"])
        earlier = {} if before.run is None else load(before.run.config_file)
    except UserError:  # no longer there
        return [*found, {"name": "unknown", "license": "unknown"}]
    return found + (_starts(earlier, start) if earlier and before.name != name else [])


def license_beside(path: Path | None) -> str:
    """The license that the model card or timm's config.json beside weights says, else "unknown".
    The license of a program is not that of weights.
    """
    if path is None:
        return "unknown"
    file = weights_file(path)
    try:
        text = (file.parent / "README.md").read_text(encoding="utf-8")
        if found := re.match(r"---\n(?:.*\n)*?license: *[\"']?([^\"'\n]+)", text):
            return found[1].strip()
    except (OSError, ValueError):
        pass
    try:
        told = (read_about(file).get("pretrained_cfg") or {}).get("license")
    except UserError:
        told = None
    return str(told or "unknown")
