"""What makes two runs the same run: the settings asked for, the name they hash to, the data."""

from __future__ import annotations

import functools
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from dino_lite.config import Config, compose, get, leaves
from dino_lite.contracts import Splits, UserError
from dino_lite.data.roots import absolute
from dino_lite.machine import Facts
from dino_lite.planning.checks import mixes_images

# Keys that change how fast a run goes or what is shown of it, never its weights.
_SPEED = (
    "name",
    "runs_dir",
    "trust",
    "overrides",  # how the run was asked for, not what was asked for
    "choices",
    "baselines",
    "callbacks",
    "loader.num_workers",
    "trainer.devices",
    "trainer.num_nodes",
    "trainer.accelerator",
    "trainer.micro_batch_size",
    "trainer.memory",
    "trainer.compile",
)
_NUM_NAMED = 100  # classes
_PATHS = (".base", ".pretrained", "checkpoint")
_FOLDERS = ("runs_dir", "features_dir", "out", "pack", "pictures")
_ABSENT = "(absent)"


def is_speed(key: str) -> bool:
    """True for a dotted key that may be planned anew when a run is resumed."""
    return any(key == speed or key.startswith(f"{speed}.") for speed in _SPEED)


def absolute_paths(config: Config) -> Config:
    """`config` with `~` and environment variables in paths expanded, and relative ones made
    absolute where they exist.
    """

    def visit(node: Any, key: str) -> Any:
        if isinstance(node, dict):
            return {name: visit(value, f"{key}.{name}") for name, value in node.items()}
        if isinstance(node, str) and key in _FOLDERS:
            return str(Path(os.path.expandvars(node)).expanduser())
        if isinstance(node, str) and key.endswith((".labels", ".out")):  # labels: or a word
            return str(Path(os.path.expandvars(node)).expanduser())
        if key.endswith(".root"):
            return absolute(node)
        if isinstance(node, str) and key.endswith(_PATHS):
            path = Path(os.path.expandvars(node)).expanduser()
            return str(path.resolve()) if path.exists() or path.is_absolute() else node
        return node

    return {name: visit(value, name) for name, value in config.items()}


def requested(config: Config) -> Config:
    """Every composed setting that decides the weights, by dotted key: speed keys are left out."""
    request = {key: value for key, value in leaves(config) if not is_speed(key)}
    if mixes_images(config):
        request["trainer.micro_batch_size"] = get(config, "trainer.micro_batch_size")
    return request


@functools.cache
def defaults() -> Config:
    """`requested` of a bare `dino-lite pretrain`."""
    return requested(compose("pretrain", []))


def changed_from_defaults(request: Config) -> Config:
    """The settings of `request` that differ from a bare `dino-lite pretrain`, and the nodes that
    only the latter has: a key that is new in the defaults changes nothing.
    """
    bare = defaults()
    changed = {key: value for key, value in request.items() if bare.get(key, _ABSENT) != value}
    present = {node for key in request for node in _nodes(key)}
    for key in bare.keys() - request.keys():
        missing = next(node for node in _nodes(key) if node not in present)
        parent = missing.rpartition(".")[0]
        if f"{parent}._target_" not in changed:  # another class is expected to have other keys
            changed[missing] = _ABSENT
    return changed


def _nodes(key: str) -> list[str]:
    """A dotted key's nodes from the top: a, a.b, a.b.c."""
    parts = key.split(".")
    return [".".join(parts[: depth + 1]) for depth in range(len(parts))]


def data_card(splits: Splits, facts: Facts) -> dict[str, Any]:
    """What a run is trained on: a digest that recognizes the images, and their kind."""
    return {
        "name": splits.name,
        "num_images": len(splits.train),
        "digest": splits.train.digest(),
        "num_test": facts.num_test,
        "size": [facts.width, facts.height, facts.channels],
        "num_classes": facts.num_classes,
        "classes": splits.train.classes[:_NUM_NAMED],
    }


def run_name(config: Config, request: Config, facts: Facts) -> str:
    """The folder's name: `name=`, or method_source_backbone_ and 6 hex digits over the settings
    that differ from the defaults. The method is the chosen file of conf/method.
    """
    if config["name"] != "auto":
        name = str(config["name"])
        if not name or Path(name).name != name or name.startswith("."):
            raise UserError(
                f"name={name}: a run's name is a folder's, without slashes and leading dots."
            )
        return name
    identity = json.dumps(changed_from_defaults(request), sort_keys=True)
    digest = hashlib.sha1(identity.encode()).hexdigest()[:6]
    method = str(config["method"]["_target_"]).rpartition(".")[2].lower()
    method = config.get("choices", {}).get("method", method).rpartition("/")[2]
    family = str(config["backbone"]["_target_"]).rpartition(".")[2].lower()
    backbone = str(config["backbone"].get("name", family)).partition("_patch")[0]
    source = "".join(c if c.isalnum() or c in "-." else "-" for c in facts.source) or "data"
    return f"{method}_{source}_{backbone}_{digest}"
