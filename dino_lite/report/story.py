"""Collects what is known about a checkpoint: a run, an export or a third-party file."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from dino_lite.config import Config, compose, differences, get, load
from dino_lite.contracts import Trust, UserError
from dino_lite.eval.baselines import knn_result
from dino_lite.eval.curves import read_curves
from dino_lite.formats.plain import Layout
from dino_lite.overrides import unquote
from dino_lite.runs.checkpoint import Checkpoint, open_backbone
from dino_lite.runs.identity import absolute_paths, requested
from dino_lite.runs.old_names import current
from dino_lite.runs.run import Run, read_json
from dino_lite.runs.sequence_folder import title_of
from dino_lite.runs.trust import demand_trust, targets

T = TypeVar("T")


class Story(NamedTuple):
    """The content of a report; unknown parts are empty."""

    title: str
    folder: Path | None  # of the run or export, with its pictures
    is_run: bool
    config: Config
    config_text: str
    environment: dict[str, Any]
    results: dict[str, Any]
    curves: dict[str, np.ndarray]  # by column of metrics.csv: "n 2", step and value
    bad_files: list[list[str]]  # path, reason
    about: dict[str, Any]  # of a backbone without a run
    command: str | None
    missing: list[str]  # sentences about parts that could not be read

    def at(self, key: str) -> Any:
        """The value of the configuration at a dotted key, None if absent."""
        try:
            return get(self.config, key)
        except (KeyError, TypeError):
            return None


class Result(NamedTuple):
    """The result of one evaluation, and the checkpoint it belongs to ("last", "best" or "")."""

    name: str
    checkpoint: str
    found: dict[str, Any]


def read_story(checkpoint: Checkpoint, trust: Trust = (), layout: Layout | None = None) -> Story:
    """Read everything known about a checkpoint; unreadable files are listed in `missing`."""
    run = checkpoint.run
    return _of_backbone(checkpoint, trust, layout) if run is None else _of_run(run, trust)


def _of_run(run: Run, trust: Trust) -> Story:
    missing: list[str] = []

    def tried(read: Callable[[], T], otherwise: T) -> T:
        try:
            return read()
        except UserError as error:
            missing.append(str(error))
            return otherwise

    config = current(load(run.config_file))
    nothing: dict[str, Any] = {}
    environment = tried(lambda: read_json(run.environment_file), nothing)
    return Story(
        title=title_of(run),
        folder=run.folder,
        is_run=True,
        config=config,
        config_text=run.config_file.read_text(encoding="utf-8"),
        environment=environment,
        results=tried(run.results, nothing),
        curves=tried(lambda: read_curves(run.folder / "metrics.csv"), {}),
        bad_files=run.unreadable(),
        about={},
        command=reproduce(config, environment.get("request"), trust),
        missing=missing,
    )


def _of_backbone(checkpoint: Checkpoint, trust: Trust, layout: Layout | None) -> Story:
    opened = open_backbone(checkpoint, trust, layout)
    backbone, card = opened.backbone, opened.card
    config = card.get("config") or {}
    path = checkpoint.results_file
    results = read_json(path) if path.is_file() else {}
    return Story(
        title=str(card.get("run") or checkpoint.title),
        folder=checkpoint.path if checkpoint.kind == "export" else None,
        is_run=False,
        config=config,
        config_text=json.dumps(card, indent=2) if card else "",
        environment={},
        results=results,
        curves={},
        bad_files=[],
        about={
            **{"path": str(checkpoint), "spec": backbone.stored_spec()},
            **{"num_parameters": sum(part.numel() for part in backbone.parameters())},
            **{"in_chans": backbone.in_chans, "image_size": opened.preprocessing.pixels},
            **{"mean": opened.mean, "std": opened.std},
            **{key: card.get(key) for key in ("steps", "checkpoint")},
        },
        command=reproduce(config, None),
        missing=[],
    )


def reproduce(config: Config, request: Mapping[str, Any] | None, trust: Trust = ()) -> str | None:
    """The command line that reproduces a run, from any folder; None if it was not saved.

    If the original `request` is given (by dotted key), the command is composed again and compared
    with it. Returns None if the result differs, if it needs code of a package that `trust` does not
    name, or if an override sets a key of Hydra.
    """
    words = []
    for override in config.get("overrides") or ():
        spoken = unquote(override)
        key = spoken.partition("=")[0].lstrip("+")
        known = None if request is None else request.get(key)
        paths = [str(path) for path in known] if isinstance(known, list) else [str(known)]
        if all(Path(path).is_absolute() for path in paths):
            whole = f"[{','.join(paths)}]" if isinstance(known, list) else paths[0]
            spoken = f"{spoken.partition('=')[0]}={whole}"
        words.append(spoken)
    if any(word.lstrip("+~").startswith("hydra") for word in words):
        return None  # hydra.searchpath may import a package
    if request is not None:
        try:
            composed = compose("pretrain", words)
            demand_trust(targets(composed), trust, "overrides")
            again = requested(absolute_paths(composed))
        except UserError:
            return None
        if differences(dict(request), again):
            return None
    elif not words:
        return None
    return shlex.join(["dino-lite", "pretrain", *words])


def results_of(results: Mapping[str, Any]) -> list[Result]:
    """All evaluations in a results.json, those of the last checkpoint first."""
    groups = {"last": results.get("last"), "": results} | dict(results)
    found = [
        Result(str(name), group, value)
        for group, part in groups.items()
        if isinstance(part, dict) and not _is_result(part)
        for name, value in part.items()
        if _is_result(value)
    ]
    known = {(result.name, "baselines" in result.found) for result in found}
    if (known_knn := knn_result(results)) and ("knn", True) not in known:
        found.append(Result("knn", "last", known_knn))
    return found


def _is_result(value: Any) -> bool:
    """Whether `value` is the result of an evaluation; nested parts of a result have no metric."""
    return (
        isinstance(value, dict)
        and "metric" in value
        and isinstance(value.get("value"), int | float)
    )
