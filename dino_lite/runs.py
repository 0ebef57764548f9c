"""A run's folder: its name, its lock, what lies in it, and what a resumed run must find again."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows has none: two processes may then train one run
    fcntl = None  # type: ignore[assignment]

from dino_lite.config import Config, differences, get, leaves, load, put
from dino_lite.contracts import Splits, UserError
from dino_lite.data.roots import absolute
from dino_lite.machine import Facts
from dino_lite.planning.checks import mixes_images

# Keys that change how fast a run goes or what is seen of it, never its weights.
_SPEED = (
    "name",
    "runs_dir",
    "overrides",  # how it was asked for, not what
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
    """What was asked for, speed left out, by dotted key: the same request finds the same run."""
    request = {key: value for key, value in leaves(config) if not is_speed(key)}
    if mixes_images(config):
        request["trainer.micro_batch_size"] = get(config, "trainer.micro_batch_size")
    return request


def data_card(splits: Splits, facts: Facts) -> dict[str, Any]:
    """What a run was trained on: which images (to know them again), and what kind."""
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
    """method_source_backbone_hash, or what `name=` says; a method is called as in conf/method, in
    configurations that do not tell by its class.
    """
    if config["name"] != "auto":
        name = str(config["name"])
        if not name or Path(name).name != name or name.startswith("."):
            raise UserError(
                f"name={name}: a run's name is a folder's, without slashes and leading dots."
            )
        return name
    digest = hashlib.sha1(json.dumps(request, sort_keys=True).encode()).hexdigest()[:6]
    method = str(config["method"]["_target_"]).rpartition(".")[2].lower()
    method = config.get("choices", {}).get("method", method).rpartition("/")[2]
    backbone = str(config["backbone"]["name"]).partition("_patch")[0]
    source = "".join(c if c.isalnum() or c in "-." else "-" for c in facts.source) or "data"
    return f"{method}_{source}_{backbone}_{digest}"


def resume_config(
    run: Run, planned: Config, request: Config, splits: Splits, is_auto: bool = False
) -> Config:
    """The run's saved configuration with speed keys planned anew; refuses another request, other
    data, lost precision. Where the size of micro-batches `is_auto`, a smaller one than planned was
    chosen for want of memory, and is kept.
    """
    before = read_json(run.environment_file)
    changed = differences(before["request"], request)
    if changed:
        key = changed[0]
        old, new = before["request"].get(key), request.get(key)
        if key.startswith("trainer.max_"):
            why = "schedules depend on a run's length: train anew under another name="
        else:
            why = "give the same settings to go on with it, or another name="
        raise UserError(f"{run.folder} was started with {key}={old}, not {new}: {why}.")
    data = before["data"]
    if (data["num_images"], data["digest"]) != (len(splits.train), splits.train.digest()):
        raise UserError(
            f"{run.folder} was trained on {data['num_images']} images, and the data has "
            "changed since (now "
            f"{len(splits.train)} images): restore the data, or choose another name= to start anew."
        )
    config = load(run.config_file)
    if config["trainer"]["precision"] == "bf16" and planned["trainer"]["precision"] == "32":
        raise UserError(
            f"{run.folder} was trained in bf16, which this machine lacks: resume it where it "
            "was started."
        )
    key = "trainer.micro_batch_size"
    old, new = get(config, key), get(planned, key)
    if old != new and mixes_images(config):  # the plan chose such a network: nobody asked for it
        raise UserError(
            f"{run.folder} learns from images together, {key}={old}, not {new}: give the same to "
            "go on with it, or another name=."
        )
    for name, value in leaves(planned):
        if is_speed(name):
            config = put(config, name, value)
    keeps = is_auto and old and (not new or old < new)
    return put(config, key, old) if keeps else config


class Run:
    """Paths of one run's folder, and the few files that are read and written whole."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config_file = folder / "config.yaml"
        self.environment_file = folder / "environment.json"
        self.results_file = folder / "results.json"
        self.checkpoints = folder / "checkpoints"
        self.last = self.checkpoints / "last.ckpt"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep the run for this process; however it ends, the lock ends with it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / ".lock", "w") as lock:
            try:
                if fcntl is not None:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise UserError(
                    f"{self.folder} is being trained by another process: wait for it, or choose "
                    "another name=."
                ) from error
            yield

    def results(self) -> dict[str, Any]:
        """results.json, empty where there is none yet."""
        return read_json(self.results_file) if self.results_file.is_file() else {}

    def add_results(self, results: dict[str, Any]) -> None:
        """Merge `results` into results.json."""
        merge_json(self.results_file, lambda before: before | results)

    def add_warnings(self, warnings: list[dict[str, Any]]) -> None:
        """Keep the latest of each kind under "warnings" in results.json."""

        def merged(before: dict[str, Any]) -> dict[str, Any]:
            by_kind = {w["kind"]: w for w in [*before.get("warnings", []), *warnings]}
            return before | {"warnings": list(by_kind.values())}

        if warnings:
            merge_json(self.results_file, merged)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write `content` whole or not at all."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write `text` whole or not at all; what no file can hold becomes a question mark."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")  # others may write it as well
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text, encoding="utf-8", errors="replace")
        partial.replace(path)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}.") from error


def merge_json(path: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Replace what a file holds (nothing, where it is not there) by what `change` makes of it; of
    several processes each waits for the others.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path.with_name(f".{path.name}.lock"), "w") as lock:
            if fcntl is not None:
                fcntl.flock(lock, fcntl.LOCK_EX)
            write_json(path, change(read_json(path) if path.is_file() else {}))
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}.") from error


def read_json(path: Path) -> dict[str, Any]:
    """Read what `write_json` wrote."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}.") from error
    return dict(content)
