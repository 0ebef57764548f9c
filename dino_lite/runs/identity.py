"""Identity of a run: the requested settings, the name derived from their hash, and the data."""

from __future__ import annotations

import functools
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from dino_lite.config import Config, compose, get, leaves
from dino_lite.contracts import Splits, UserError
from dino_lite.data.names import LONGEST, file_name, safe_name
from dino_lite.data.roots import absolute
from dino_lite.machine import Facts
from dino_lite.planning.checks import mixes_images
from dino_lite.settings.validate import locate, parameters

# Keys that affect the speed of a run or what it reports, never its weights.
SPEED = (
    "name",
    "runs_dir",
    "trust",
    "overrides",  # how the settings were given, not what they are
    "choices",
    "baselines",
    "plan",
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
ABSENT = "(absent)"


def is_speed(key: str) -> bool:
    """Whether a dotted key may be planned again when a run is resumed."""
    return any(key == speed or key.startswith(f"{speed}.") for speed in SPEED)


def absolute_paths(config: Config) -> Config:
    """Expand `~` and environment variables in the paths of `config`, and make relative paths that
    exist absolute.
    """

    def visit(node: Any, key: str) -> Any:
        if isinstance(node, dict):
            return {name: visit(value, f"{key}.{name}") for name, value in node.items()}
        if isinstance(node, str) and key in _FOLDERS:
            return str(Path(os.path.expandvars(node)).expanduser())
        if isinstance(node, str) and key.endswith((".labels", ".out")):  # labels may be a keyword
            return str(Path(os.path.expandvars(node)).expanduser())
        if key.endswith(".root") or key == "stages":
            return absolute(node)
        if isinstance(node, str) and key.endswith(_PATHS):
            path = Path(os.path.expandvars(node)).expanduser()
            return str(path.resolve()) if path.exists() or path.is_absolute() else node
        return node

    return {name: visit(value, name) for name, value in config.items()}


def requested(config: Config) -> Config:
    """Every composed setting that affects the weights, by dotted key: without speed keys."""
    request = {key: value for key, value in leaves(config) if not is_speed(key)}
    if mixes_images(config):
        request["trainer.micro_batch_size"] = get(config, "trainer.micro_batch_size")
    return request


@functools.cache
def defaults(command: str = "pretrain") -> Config:
    """`requested` of a bare `dino-lite COMMAND`."""
    return requested(compose(command, []))


def changed_from_defaults(request: Config, command: str = "pretrain") -> Config:
    """The settings of `request` that differ from a bare `dino-lite COMMAND`, and the nodes that
    exist only in the latter. A new key with a default changes nothing: neither in the bare run, nor
    in another choice, if its value there is the constructor's own default.
    """
    bare = defaults(command)
    changed = {k: v for k, v in request.items() if bare.get(k, default_of(request, k)) != v}
    present = {node for key in request for node in _nodes(key)}
    for key in bare.keys() - request.keys():
        missing = next((node for node in _nodes(key) if node not in present), None)
        if missing is None:  # a group here, whose keys are compared
            continue
        parent = missing.rpartition(".")[0]
        if f"{parent}._target_" not in changed:  # another class is expected to have other keys
            changed[missing] = ABSENT
    return changed


def default_of(request: Config, key: str) -> Any:
    """The default of a dotted key in the constructor that takes it."""
    parent, _, name = key.rpartition(".")
    target = request.get(f"{parent}._target_")
    found = ABSENT if target is None else parameters(locate(target)).defaults.get(name, ABSENT)
    return list(found) if isinstance(found, tuple) else found


def _nodes(key: str) -> list[str]:
    """The nodes on the path to a dotted key, from the root: a, a.b, a.b.c."""
    parts = key.split(".")
    return [".".join(parts[: depth + 1]) for depth in range(len(parts))]


def data_card(splits: Splits, facts: Facts) -> dict[str, Any]:
    """Describe the data of a run: a digest that identifies the images, counts, size and classes."""
    return {
        "name": splits.name,
        "num_images": len(splits.train),
        "digest": splits.train.digest(),
        "num_test": facts.num_test,
        "size": [facts.width, facts.height, facts.channels],
        "sizes": facts.sizes,
        "num_classes": facts.num_classes,
        "classes": splits.train.classes[:_NUM_NAMED],
    }


def run_name(config: Config, request: Config, facts: Facts) -> str:
    """Name of the run's folder: `name=`, or method_source_backbone_HASH with a hash of 6 hex digits
    over the settings that differ from the defaults. The method is the choice in conf/method.
    """
    if (name := _given_name(config)) is not None:
        return name
    method = str(config["method"]["_target_"]).rpartition(".")[2].lower()
    method = config.get("choices", {}).get("method", method).rpartition("/")[2]
    family = str(config["backbone"]["_target_"]).rpartition(".")[2].lower()
    backbone = str(config["backbone"].get("name", family)).partition("_patch")[0]
    end = f"_{backbone}_{_digest(request, 'pretrain')}"
    return file_name(f"{method}_{safe_name(facts.source)}", end)


def sequence_name(command: str, config: Config, request: Config, source: str) -> str:
    """Name of a sequence's folder: `name=`, or COMMAND_source_HASH, as for a run."""
    if (name := _given_name(config)) is not None:
        return name
    return file_name(f"{command}_{safe_name(source)}", f"_{_digest(request, command)}")


def _digest(request: Config, command: str) -> str:
    """6 hex digits over the settings that differ from a bare `dino-lite COMMAND`."""
    identity = json.dumps(changed_from_defaults(request, command), sort_keys=True)
    return hashlib.sha1(identity.encode()).hexdigest()[:6]


def _given_name(config: Config) -> str | None:
    """`name=`, None if it is auto. Raises UserError if no folder can have it."""
    if config["name"] == "auto":
        return None
    name = str(config["name"])
    if not name or Path(name).name != name or name.startswith("."):
        raise UserError(
            f"name={name}: must be the name of a folder, without slashes or a leading dot."
        )
    if (size := len(os.fsencode(name))) > LONGEST:
        raise UserError(
            f"name={name[:20]}…: {size} bytes are too long for the name of a folder: choose a "
            f"name of at most {LONGEST}."
        )
    return name
