"""What is known about every run in a folder, from its small files; imports no torch."""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import yaml  # type: ignore[import-untyped]

from dino_lite.errors import UserError
from dino_lite.runs.run import Run, read_json
from dino_lite.runs.sequence_folder import SequenceFolder, title_of

_TAIL = 2**16  # bytes at the end of metrics.csv that are read
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class Listed(NamedTuple):
    """A run. k-NN accuracies are in percent, None if they are not known; `knn_online` is the one
    that training measures on its own images. `total` steps are an estimate for a timed run.
    `changed` is when its checkpoint was written, in seconds since the epoch.
    """

    name: str
    # training | finishing | interrupted | trained | finished | empty | damaged | no config.yaml
    state: str
    method: str
    backbone: str
    steps: int
    total: int | None
    knn: float | None
    knn_online: float | None
    knn_raw_pixels: float | None
    knn_untrained: float | None
    changed: float
    num_bytes: int


def list_runs(runs_dir: Path) -> list[Listed]:
    """The runs in `runs_dir`, newest first, with the stages of a sequence below it; others are
    left out. `runs_dir` may also be one run or sequence, or a folder whose own "runs" has some,
    without runs itself. Raises UserError if it cannot be read.
    """
    if _is_run(runs_dir):
        return describe_all(runs_dir.resolve())
    found, inner = _runs_in(runs_dir), runs_dir / "runs"
    if not found and inner.is_dir():
        found = _runs_in(inner)
    listed = sorted(map(describe_all, found), key=lambda runs: -runs[0].changed)
    return [run for runs in listed for run in runs]


def _runs_in(folder: Path) -> list[Path]:
    try:
        inside = [path for path in folder.iterdir() if not path.name.startswith(".")]
    except OSError as error:
        raise UserError(
            f"runs_dir={folder} cannot be read ({error.strerror}): name the folder of the runs."
        ) from error
    return [path for path in inside if _is_run(path)]


def _is_run(folder: Path) -> bool:
    run = Run(folder)
    return run.config_file.is_file() or run.last.is_file() or SequenceFolder(folder).exists()


def describe_all(folder: Path) -> list[Listed]:
    """What the files of a run say; of a sequence, its sum, and each stage that has begun."""
    sequence = SequenceFolder(folder)
    if not sequence.exists():
        return [describe(Run(folder))]
    try:
        known, runs = sequence.read(), sequence.runs()
    except UserError:
        known, runs = {"command": "", "stages": []}, []
    stages = [describe(run) for run in runs]
    last = stages[-1] if stages else describe(Run(folder))
    done = sum(stage.get("finished") is True for stage in known["stages"])
    total = len(known["stages"])
    state = "finished" if done == total else f"{min(done + 1, total)} of {total}"
    if Run(folder).is_locked():
        state = f"training {done + 1} of {total}" if done < total else "finishing"
    whole = last._replace(
        name=folder.name,
        state=state if total else "damaged",
        method=str(known.get("command", "")),
        steps=sum(stage.steps for stage in stages if stage.name.count("/") == 1),
        total=None,
        num_bytes=sum(_sizes(folder)),
    )
    return [whole, *stages]


def describe(run: Run) -> Listed:
    """What the files of a run say; a file that is missing or damaged says nothing."""
    config = _read_config(run.config_file)
    results = _read(run.results_file)
    measured = _measured(run.folder / "metrics.csv")
    backbone = _node(config, "backbone")
    method = str(_node(config, "method").get("_target_", "")).rpartition(".")[2].lower()
    evaluated = _number(_node(_node(results, "last"), "knn"), "top1")
    trained, steps = _number(results, "knn_trained"), _number(results, "steps")
    total = _total(run, config, results) if steps is None else steps
    return Listed(
        name=title_of(run),
        state=_state(run, config, results),
        method=str(_node(config, "choices").get("method", method)),
        backbone=str(backbone.get("name") or str(backbone.get("_target_", "")).rpartition(".")[2]),
        steps=int(measured.get("step", -1) + 1 if steps is None else steps),
        total=None if total is None else int(total),
        knn=evaluated if trained is None else trained,
        knn_online=measured.get("knn"),
        knn_raw_pixels=_number(results, "knn_raw_pixels"),
        knn_untrained=_number(results, "knn_untrained"),
        changed=_changed(run),
        num_bytes=sum(_sizes(run.folder)),
    )


def _state(run: Run, config: dict[str, Any], results: dict[str, Any]) -> str:
    done = next((state for state in ("finished", "trained") if results.get(state)), "")
    if run.is_locked():
        return "finishing" if done else "training"
    if not config:
        return "damaged" if run.config_file.is_file() else "no config.yaml"
    return done or ("interrupted" if run.last.is_file() else "empty")


def _total(run: Run, config: dict[str, Any], results: dict[str, Any]) -> float | None:
    """The number of steps of the whole run; of a timed one as estimated from its first steps."""
    trainer, data = _node(config, "trainer"), _node(_read(run.environment_file), "data")
    num_images, epochs = _number(data, "num_images"), _number(trainer, "max_epochs")
    batch_size = _number(_node(config, "loader"), "batch_size")
    if num_images and epochs and batch_size:
        return max(1, round(epochs * num_images / batch_size))  # as Clock
    return _number(trainer, "max_steps") or _number(_node(results, "estimate"), "steps")


def _measured(file: Path) -> dict[str, float]:
    """The latest value of each column of metrics.csv, in its last rows."""
    try:
        with open(file, "rb") as lines:
            header = lines.readline()
            lines.seek(max(len(header), os.path.getsize(file) - _TAIL))
            rows = lines.read().decode(errors="replace").splitlines()
    except OSError:
        return {}
    latest: dict[str, float] = {}
    names = header.decode(errors="replace").strip().split(",")
    for row in csv.reader(rows):
        if len(row) == len(names):
            with suppress(ValueError):
                latest |= {
                    name: float(value) for name, value in zip(names, row, strict=True) if value
                }
    return latest


def _read(file: Path) -> dict[str, Any]:
    try:
        return read_json(file)
    except (UserError, TypeError, ValueError):
        return {}


def _read_config(file: Path) -> dict[str, Any]:
    try:
        content = yaml.load(file.read_bytes(), _LOADER)
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return content if isinstance(content, dict) else {}


def _number(config: dict[str, Any], key: str) -> float | None:
    value = config.get(key)
    return value if isinstance(value, int | float) and math.isfinite(value) else None


def _node(config: dict[str, Any], key: str) -> dict[str, Any]:
    node = config.get(key)
    return node if isinstance(node, dict) else {}


def _changed(run: Run) -> float:
    """When the last checkpoint was written, or the run was begun."""
    for path in (run.last, run.config_file):
        with suppress(OSError):
            return path.stat().st_mtime
    return 0.0


def _sizes(folder: Path) -> Iterator[int]:
    """Bytes of every file below `folder`."""
    for place, _, files in os.walk(folder):
        for name in files:
            with suppress(OSError):  # removed in the meantime
                yield os.lstat(os.path.join(place, name)).st_size
