"""Continuing a run: its saved configuration decides, and what would change results is refused."""

from __future__ import annotations

from typing import Any

from dino_lite.config import Config, get, leaves, load, put
from dino_lite.contracts import Splits, UserError
from dino_lite.planning.checks import mixes_images
from dino_lite.runs.identity import changed_from_defaults, is_speed
from dino_lite.runs.old_names import current
from dino_lite.runs.run import Run, read_json

_MISSING = object()


def resume_config(
    run: Run, planned: Config, request: Config, splits: Splits, is_auto: bool = False
) -> Config:
    """The run's saved configuration with its speed keys planned anew. Where the size of micro-
    batches `is_auto`, one that is smaller than planned was chosen for want of memory: it is kept.

    A key that the saved run lacks keeps its old behavior, the default in code. Raises UserError
    where a setting or a default differs, the data has changed, or this machine lacks the precision.
    """
    before = read_json(run.environment_file)
    config: Config = current(load(run.config_file))
    _check_request(run, current(before["request"]), request, config, planned)
    data = before["data"]
    if (data["num_images"], data["digest"]) != (len(splits.train), splits.train.digest()):
        raise UserError(
            f"{run.folder} was trained on {data['num_images']} images, and the data has "
            "changed since (now "
            f"{len(splits.train)} images): restore the data, or choose another name= to start anew."
        )
    if config["trainer"]["precision"] == "bf16" and planned["trainer"]["precision"] == "32":
        raise UserError(
            f"{run.folder} was trained in bf16, which this machine lacks: resume it where it "
            "was started."
        )
    key = "trainer.micro_batch_size"
    old, new = get(config, key), get(planned, key)
    if old != new and mixes_images(config):  # chosen by the plan, so not in the request
        raise UserError(
            f"{run.folder} learns from images together, {key}={old}, not {new}: give the same to "
            "continue it, or another name=."
        )
    for name, value in leaves(planned):
        if is_speed(name):
            config = put(config, name, value)
    keeps = is_auto and old and (not new or old < new)
    return put(config, key, old) if keeps else config


def _check_request(
    run: Run, before: Config, request: Config, saved: Config, planned: Config
) -> None:
    """Refuse the first setting of `request` that is not the saved run's, by name."""
    chosen = changed_from_defaults(request)
    new_words = set(planned.get("overrides") or ()) - set(saved.get("overrides") or ())
    added = tuple(word.partition("=")[0].lstrip("+~") for word in new_words)
    for key in sorted(before.keys() | request.keys()):
        old, new = before.get(key, _MISSING), request.get(key, _MISSING)
        if old == new:
            continue
        if old is _MISSING and not any(key == word or key.startswith(f"{word}.") for word in added):
            continue  # a key that is newer than the run
        if key.startswith("trainer.max_"):
            why = "schedules depend on a run's length: train anew under another name="
        elif key not in chosen and old is not _MISSING and new is not _MISSING:
            raise UserError(
                f"{run.folder} was started when {key} was {_shown(old)} by default, which is "
                f"{_shown(new)} now: give {key}={_shown(old)} and name={run.folder.name} to "
                "continue it, or another name= to start anew."
            )
        else:
            why = "give the same settings to continue it, or another name="
        raise UserError(
            f"{run.folder} was started with {key}={_shown(old)}, not {_shown(new)}: {why}."
        )


def _shown(value: Any) -> str:
    """A value as a message gives it."""
    return "absent" if value is _MISSING else "null" if value is None else str(value)
