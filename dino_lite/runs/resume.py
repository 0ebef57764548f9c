"""Resuming a run: its saved configuration applies, and changes that affect results are rejected."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from dino_lite.config import Config, get, load, put
from dino_lite.contracts import Splits, Trust, UserError
from dino_lite.planning.checks import mixes_images
from dino_lite.planning.plan import open_splits
from dino_lite.runs.identity import SPEED, changed_from_defaults
from dino_lite.runs.old_names import current
from dino_lite.runs.run import Run, read_json
from dino_lite.runs.trust import demand_trust, targets
from dino_lite.settings.validate import locate, parameters
from dino_lite.wording import count

_MISSING = object()


def resume_config(
    run: Run,
    planned: Config,
    request: Config,
    splits: Splits,
    is_auto: bool = False,
    trust: Trust = (),
) -> Config:
    """The saved configuration of the run, with speed keys from the new plan. If the micro-batch
    size `is_auto`, a saved one below the planned one was chosen after running out of memory, and is
    kept.

    A key missing from the saved run keeps its old behavior, the default in code. Raises UserError
    if a setting or a default differs, the data has changed, this machine lacks the precision, or
    the saved configuration names code that neither `planned` nor `trust` does.
    """
    before = read_json(run.environment_file)
    # Callbacks are those of this command.
    config: Config = current(load(run.config_file)) | {"callbacks": planned["callbacks"]}
    check_request(run, current(before["request"]), request, config, planned)
    # The user's own configuration names the targets of `planned`.
    demand_trust({*targets(config)} - {*targets(planned)}, trust, run.config_file)
    check_data(run, before["data"], config["data"], splits)
    if config["trainer"]["precision"] == "bf16" and planned["trainer"]["precision"] == "32":
        raise UserError(
            f"{run.folder} was trained in bf16, which this machine does not support: resume it "
            "where it was started."
        )
    key = "trainer.micro_batch_size"
    old, new = get(config, key), get(planned, key)
    if old != new and mixes_images(config):  # chosen by the plan, so not in the request
        raise UserError(
            f"{run.folder} was started with {key}={old}, not {new}, which changes its results: "
            "give the same value to resume it, or another name=."
        )
    for name in SPEED:  # a group as a whole: what was removed stays removed
        with suppress(KeyError):
            config = put(config, name, get(planned, name))
    keeps = is_auto and old and (not new or old < new)
    return put(config, key, old) if keeps else config


# How earlier versions read folders, lists and shards, in the settings of this one.
_EARLIER = (
    {"train": ".", "test": "none", "exclude": "none"},
    {"train": "train", "exclude": "none"},
    {"train": "*train*", "exclude": "none"},
)


def check_data(run: Run, before: Config, node: Config, splits: Splits) -> None:
    """Raise UserError unless train is the one of `before`: with the true reason, either that the
    data has changed, or that this version reads it differently.
    """

    def same(now: Splits) -> bool:
        known = (before["num_images"], before["digest"])
        return known == (len(now.train), now.train.digest())

    def earlier(keys: dict[str, str]) -> bool:
        if not keys.keys() <= parameters(locate(node["_target_"])).hints.keys():
            return False
        try:
            return same(open_splits(node | keys))
        except UserError:
            return False

    if same(splits):
        return
    now, then = count(len(splits.train), "image"), count(before["num_images"], "image")
    was = f"{run.folder} was trained on {then}"
    if keys := next(filter(earlier, _EARLIER), None):
        asked = " ".join(f"data.{key}={value}" for key, value in keys.items())
        raise UserError(
            f"{was}; the data is the same, but this version of dino_lite reads {now} of "
            f"it as train: choose another name= for a new run, which reads the data as before with "
            f"{asked}."
        )
    raise UserError(
        f"{was}, and the data has changed since (now {now}): restore it, or choose "
        "another name= for a new run."
    )


def check_request(
    run: Run,
    before: Config,
    request: Config,
    saved: Config,
    planned: Config,
    command: str = "pretrain",
) -> None:
    """Raise UserError for the first setting of `request` that differs from the saved run."""
    chosen = changed_from_defaults(request, command)
    words, old_words = (set(config.get("overrides") or ()) for config in (planned, saved))
    # What the user named comes before what follows from it by interpolation.
    keys = sorted(
        before.keys() | request.keys(), key=lambda k: (not _names(words | old_words, k), k)
    )
    for key in keys:
        old, new = before.get(key, _MISSING), request.get(key, _MISSING)
        if old == new:
            continue
        if old is _MISSING and not _names(words - old_words, key):
            continue  # the key was added after the run was started
        if key.startswith("trainer.max_"):
            why = "schedules depend on the length of a run: start a new run with another name=, "
            why += f"or from its weights with checkpoint={run.folder}"
        elif _MISSING not in (old, new) and key not in chosen and not _names(old_words, key):
            raise UserError(
                f"{run.folder} was started when the default of {key} was {_shown(old)}; it is now "
                f"{_shown(new)}: give {key}={_shown(old)} and name={run.folder.name} to resume it, "
                "or another name= for a new run."
            )
        else:
            why = "give the same settings to resume it, or another name= for a new run"
        raise UserError(
            f"{run.folder} was started with {key}={_shown(old)}, not {_shown(new)}: {why}."
        )


def _names(overrides: set[str], key: str) -> bool:
    """Whether one of `overrides` sets `key`, or a group that contains it."""
    nodes = {word.partition("=")[0].lstrip("+~") for word in overrides}
    return any(key == node or key.startswith(f"{node}.") for node in nodes)


def _shown(value: Any) -> str:
    """A value as shown in messages."""
    return "absent" if value is _MISSING else "null" if value is None else str(value)
