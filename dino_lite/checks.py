"""Refuses, before a run is paid for, a configuration that would fail or mislead later."""

from __future__ import annotations

import re
from collections.abc import Callable

from dino_lite.config import Config, get, leaves
from dino_lite.contracts import UserError
from dino_lite.optim.schedules import check_span, parse_span

TRAINER_KEYS = {
    "accelerator",
    "devices",
    "num_nodes",
    "num_threads",
    "max_epochs",
    "max_steps",
    "max_time",
    "precision",
    "micro_batch_size",
}
COUNTS = {
    "augment.global_size",
    "augment.local_size",
    "backbone.depth",
    "backbone.embed_dim",
    "backbone.image_size",
    "backbone.in_chans",
    "backbone.num_heads",
    "backbone.patch_size",
    "loader.batch_size",
    "method.head.bottleneck_dim",
    "method.head.hidden_dim",
    "method.head.num_layers",
    "method.head.num_prototypes",
    "trainer.devices",
    "trainer.num_nodes",
}
_TEMPERATURE = re.compile(r".*(teacher_temp\.(start|end)|student_temp)")
_NOT_NEGATIVE = re.compile(r"(optim|loader|trainer)\..*|augment\.num_.*")

Rule = tuple[Callable[[str], object], Callable[[float], bool], str]
RULES: list[Rule] = [
    (COUNTS.__contains__, lambda v: v >= 1 and v % 1 == 0, "a whole number from 1 on is needed"),
    (lambda k: k.endswith("_prob"), lambda v: 0 <= v <= 1, "a probability lies in [0, 1]"),
    (_TEMPERATURE.fullmatch, lambda v: v > 0, "a temperature is positive"),
    (
        lambda k: k.startswith("method.momentum.") or k == "method.center_momentum",
        lambda v: 0 <= v <= 1,
        "a momentum lies in [0, 1]",
    ),
    (_NOT_NEGATIVE.fullmatch, lambda v: v >= 0, "this cannot be negative"),
    (lambda k: k == "backbone.drop_path", lambda v: 0 <= v < 1, "it lies in [0, 1)"),
]


def check_values(config: Config) -> None:
    """Every number on its own: refuse what is outside its range."""
    for key, value in leaves(config):
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        for concerns, allows, why in RULES:
            if concerns(key) and not allows(value):
                raise UserError(f"{key}={value}: {why}.")
    unknown = sorted(config["trainer"].keys() - TRAINER_KEYS)
    if unknown:
        known = ", ".join(sorted(TRAINER_KEYS))
        raise UserError(f"trainer.{unknown[0]}: there is no such key; known are {known}.")


def check(config: Config) -> None:
    """A planned configuration as a whole: refuse numbers that do not go together."""
    patch, large, small = (
        get(config, key)
        for key in ("backbone.patch_size", "augment.global_size", "augment.local_size")
    )
    sizes = {"augment.global_size": large}
    if get(config, "augment.num_local"):
        sizes["augment.local_size"] = small
    for key, size in sizes.items():
        if patch > size:
            raise UserError(f"backbone.patch_size={patch}: a patch is larger than {key}={size}.")
        if size % patch:
            raise UserError(f"{key}={size}: no multiple of backbone.patch_size={patch}.")
    ranks = int(get(config, "trainer.devices")) * int(get(config, "trainer.num_nodes"))
    batch_size = get(config, "loader.batch_size")
    if batch_size % ranks:
        raise UserError(
            f"loader.batch_size={batch_size}: it counts images over all {ranks} processes and must "
            "divide by them."
        )
    precision = str(get(config, "trainer.precision"))
    if precision in ("16", "fp16", "16-mixed", "16-true"):
        raise UserError(f"trainer.precision={precision}: fp16 overflows in DINO; use bf16 or 32.")
    if precision not in ("32", "bf16", "64"):
        raise UserError(f"trainer.precision={precision}: choose auto, 32, bf16 or 64.")
    _check_length(config)


def _check_length(config: Config) -> None:
    """Exactly one measure of the run's length, and every warm-up within it."""
    measures = ("max_epochs", "max_steps", "max_time")
    given = {key: config["trainer"][key] for key in measures if config["trainer"][key] is not None}
    if len(given) != 1:
        named = " and ".join(f"trainer.{key}={value}" for key, value in given.items())
        raise UserError(
            f"{named or 'The run has no length'}: give exactly one of trainer.max_epochs, "
            "trainer.max_steps and trainer.max_time."
        )
    ((measure, length),) = given.items()
    if measure == "max_time":
        seconds(length)
    elif isinstance(length, str) or length <= 0:
        raise UserError(f"trainer.{measure}={length}: a positive number is needed.")
    for key, span in leaves(config):
        if key.rpartition(".")[2] not in ("warmup", "freeze_last_layer"):
            continue
        check_span(span, key)
        if not isinstance(span, str):
            continue
        if measure == "max_time":
            raise UserError(
                f"{key}={span}: a run measured by trainer.max_time knows fractions only, as 0.1."
            )
        count, unit = parse_span(span)
        if f"max_{unit}s" == measure and count > length:
            raise UserError(
                f"{key}={span} is longer than the run (trainer.{measure}={length}): shorten it."
            )


def seconds(duration: str | float) -> float:
    """Seconds in a text as 90s, 30m, 2h or 1d, or in a number of minutes."""
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]*)?)\s*([smhd]?)\s*", str(duration))
    if match is None or float(match[1]) <= 0:
        raise UserError(
            f'trainer.max_time={duration}: write a positive time as "90s", "30m" or "2h".'
        )
    return float(match[1]) * {"s": 1, "m": 60, "": 60, "h": 3600, "d": 86_400}[match[2]]
