"""Refuses, before a run is paid for, a planned configuration that would fail or mislead later."""

from __future__ import annotations

import re

from dino_lite.config import Config, get, leaves
from dino_lite.contracts import UserError
from dino_lite.optim.schedules import check_span

_TRAINER_KEYS = {
    "accelerator",
    "devices",
    "num_nodes",
    "max_epochs",
    "max_steps",
    "max_time",
    "precision",
    "micro_batch_size",
}


def check(config: Config) -> None:
    """Refuse, in one sentence, what would fail or mislead later."""
    number = {key: value for key, value in leaves(config) if isinstance(value, int | float)}

    def refuse(wrong: bool, key: str, why: str) -> None:
        if wrong:
            raise UserError(f"{key}={get(config, key)}: {why}")

    for key in (
        "augment.global_size",
        "augment.local_size",
        "backbone.patch_size",
        "loader.batch_size",
        "method.head.num_prototypes",
        "trainer.devices",
        "trainer.num_nodes",
    ):
        refuse(
            key in number and (number[key] < 1 or number[key] % 1 != 0),
            key,
            "a whole number from 1 on is needed.",
        )
    for key, value in number.items():
        refuse(key.endswith("_prob") and not 0 <= value <= 1, key, "a probability lies in [0, 1].")
        temperature = "teacher_temp." in key or key.endswith("student_temp")
        refuse(
            temperature and key.rpartition(".")[2] != "warmup" and value <= 0,
            key,
            "a temperature is positive.",
        )
        refuse(
            key.startswith("method.momentum.") and not 0 <= value <= 1,
            key,
            "a momentum lies in [0, 1].",
        )
        refuse(
            value < 0 and key.startswith(("optim.", "loader.", "trainer.", "augment.num_")),
            key,
            "this cannot be negative.",
        )
    patch, large, small = (
        get(config, k) for k in ("backbone.patch_size", "augment.global_size", "augment.local_size")
    )
    refuse(
        patch > large or (get(config, "augment.num_local") > 0 and patch > small),
        "backbone.patch_size",
        f"a patch is larger than a crop (global {large}, local {small} pixels).",
    )
    for key in ("augment.global_size", "augment.local_size"):
        refuse(get(config, key) % patch != 0, key, f"no multiple of backbone.patch_size={patch}.")
    ranks = int(get(config, "trainer.devices")) * int(get(config, "trainer.num_nodes"))
    refuse(
        get(config, "loader.batch_size") % ranks != 0,
        "loader.batch_size",
        f"it counts images over all {ranks} processes and must divide by them.",
    )
    precision = str(get(config, "trainer.precision"))
    refuse(
        precision in ("16", "fp16", "16-mixed"),
        "trainer.precision",
        "fp16 overflows in DINO; use bf16 or 32.",
    )
    refuse(
        precision not in ("32", "bf16", "64"), "trainer.precision", "choose auto, 32, bf16 or 64."
    )
    unknown = sorted(config["trainer"].keys() - _TRAINER_KEYS)
    if unknown:
        refuse(
            True,
            f"trainer.{unknown[0]}",
            f"there is no such key; known are {', '.join(sorted(_TRAINER_KEYS))}.",
        )
    _check_length(config)


def _check_length(config: Config) -> None:
    """Exactly one measure of the run's length, and every warm-up within it."""
    given = {
        key: value
        for key in ("max_epochs", "max_steps", "max_time")
        if (value := config["trainer"][key]) is not None
    }
    if len(given) != 1:
        names = (
            " and ".join(f"trainer.{key}={value}" for key, value in given.items()) or "no length"
        )
        raise UserError(f"{names}: give exactly one of trainer.max_epochs, max_steps and max_time.")
    ((measure, length),) = given.items()
    if measure == "max_time":
        seconds(length)
    elif not isinstance(length, int | float) or length <= 0:
        raise UserError(f"trainer.{measure}={length}: a positive number is needed.")
    for key, span in leaves(config):
        if key.rpartition(".")[2] not in ("warmup", "freeze_last_layer"):
            continue
        check_span(span, key)
        if isinstance(span, str) and measure == "max_time":
            raise UserError(
                f"{key}={span}: a run measured by trainer.max_time knows fractions only, as 0.1."
            )
        unit = {"max_epochs": "epoch", "max_steps": "step"}.get(measure, "")
        if isinstance(span, str) and unit in span and float(span.split()[0]) > float(length):
            raise UserError(
                f"{key}={span} is longer than the run (trainer.{measure}={length}): shorten it."
            )


def seconds(duration: str | float) -> float:
    """ "90s", "30m", "2h", "1d" or a number of minutes, in seconds."""
    match = re.fullmatch(r"\s*([0-9.]+)\s*([smhd]?)\s*", str(duration))
    if match is None or float(match[1]) <= 0:
        raise UserError(
            f'trainer.max_time={duration}: write a positive time as "90s", "30m" or "2h".'
        )
    return float(match[1]) * {"s": 1, "m": 60, "": 60, "h": 3600, "d": 86_400}[match[2]]
