"""Validates a configuration before a run starts: rejects what would fail or mislead later."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from dino_lite.config import Config, get, leaves
from dino_lite.contracts import Backbone, Penalty, Progress, Traits, UserError
from dino_lite.machine import Facts
from dino_lite.optim.schedules import parse_span, span_steps
from dino_lite.planning.groups import RECORDS, Replay, Settings, Start
from dino_lite.settings.validate import locate, locate_class, parameters, settings_of, validated
from dino_lite.wording import count


def check_values(config: Config, auto: bool = True) -> Config:
    """Check each value against the annotation of the constructor that takes it. Returns `config`
    with integers written as floats (1e3) converted to int.

    With `auto`, any value may be "auto", to be replaced by `plan`. Keys missing from the groups
    `trainer`, `loader` and `optim` get their defaults. Raises UserError naming the first key that
    does not exist or is missing, or whose value has the wrong type or is out of range.
    """
    for word in config.get("overrides") or ():
        name = word.partition("=")[0].removeprefix("~")
        if word.startswith("~") and name in parameters(Settings).hints and name not in config:
            raise UserError(f"~{name}: the key {name} is required; omit ~{name}.")
    network = dict(config.get("backbone") or {})
    keep = dict(config.get("keep") or {})
    # Not arguments of the constructors.
    start = {key: network.pop(key) for key in ("pretrained",) if key in network}
    replay = {key: keep.pop(key) for key in ("share",) if key in keep}
    nodes = {name: node for name, node in (("backbone", network), ("keep", keep)) if node}
    read = validated(Settings, config | nodes, auto=auto)
    if start:
        read["backbone"] |= validated(Start, start, "backbone.")
    if replay:
        read["keep"] |= validated(Replay, replay, "keep.")
    defaults = {name: parameters(kind).defaults for name, kind in RECORDS.items() if name in read}
    return read | {name: values | read[name] for name, values in defaults.items()}


def mixes_images(config: Config) -> bool:
    """Whether results depend on which images share a micro-batch. A loss or head declares it by
    `mixes_images` (a bool, or a function of its settings), a backbone in its traits.
    """
    for node in target_nodes([config["loss"], config["method"]]):
        says = getattr(locate(node["_target_"]), "mixes_images", False)
        if says(settings_of(node)) if callable(says) else says:
            return True
    return any(traits_of(each).mixes_images for each in by_student(config))


def by_student(config: Config) -> list[Config]:
    """The configuration with the backbone of each student; with its own if it has no students."""
    students = (config.get("students") or {}).values()
    return [config | {"backbone": node} for node in students] or [config]


def target_nodes(value: Any) -> Iterator[Config]:
    """All nodes with a `_target_` in `value`, at any depth."""
    if isinstance(value, dict) and "_target_" in value:
        yield value
    if isinstance(value, dict | list):
        for each in value.values() if isinstance(value, dict) else value:
            yield from target_nodes(each)


def traits_of(config: Config) -> Traits:
    """The traits that the backbone's class declares for its settings."""
    settings = dict(config["backbone"])
    family = locate_class(settings, "backbone", Backbone)
    del settings["_target_"]
    return family.traits(**settings)


def is_penalty(loss: Config) -> bool:
    """Whether a loss reads weights instead of a match."""
    target = locate(loss["_target_"])
    return isinstance(target, type) and issubclass(target, Penalty)


def read_by(name: str, loss: Config) -> str:
    """The name of the match that a loss reads: its setting `reads`, or its class's attribute."""
    target = locate(loss["_target_"])
    reads = settings_of(loss).get("reads") or getattr(target, "reads", None)
    if not isinstance(reads, str):
        raise UserError(
            f"loss.{name}: {loss['_target_']} does not name the match that it reads; it must be a "
            "dino_lite.contracts.Loss with the keyword or class attribute `reads`."
        )
    return reads


def _check_uses(config: Config) -> None:
    """Check that every weight is used by a loss: otherwise DDP would wait for its gradient."""
    if not config["loss"]:
        raise UserError("loss=[]: there is no loss to train on; choose loss=[dino] or another.")
    of_matches = {name: loss for name, loss in config["loss"].items() if not is_penalty(loss)}
    method, reads = config["method"], set(map(read_by, of_matches, of_matches.values()))
    penalties = [name for name in config["loss"] if name not in of_matches]
    if penalties and config.get("adapter"):
        raise UserError(
            f"loss.{penalties[0]} holds weights that an adapter does not change: remove it "
            f"(~loss.{penalties[0]}), or set adapter=none."
        )
    masks, of_patches = (
        method.get("masking") is not None,
        {"patch", "patch_embedding", "masked_tokens"} & reads,
    )
    if masks and not of_patches:
        raise UserError(
            "method.masking: no loss reads masked patches; add one, or set method.masking=null."
        )
    heads = {"head": ("cls", True), "patch_head": ("patch", masks)}
    for name, (match, used) in heads.items():
        head = method.get(name)
        if used and head and head.get("num_prototypes") and match not in reads:
            if name == "head" and method.get("patch_head", 0) is None and "patch" in reads:
                continue  # patches share its prototypes
            raise UserError(
                f"method.{name}: no loss reads its prototypes; set "
                f"method.{name}.num_prototypes=0, or choose loss=[dino] or another that does."
            )
    serves = "head" if method.get("patch_head", 0) is None and masks else "patch_head"
    if (method.get(serves) or {}).get("batch_norm"):
        raise UserError(
            f"method.{serves}.batch_norm=true: the number of masked patches varies, and a single "
            "one has no variance; remove this setting."
        )
    if any(each["backbone"].get("mask_token") for each in by_student(config)) and not masks:
        raise UserError(
            "backbone.mask_token=true: the method masks no patches; remove this setting, or choose "
            "method=dinov2."
        )


def setting(config: Config, key: str, otherwise: Any = None) -> Any:
    """The value at a dotted key of a node with a `_target_`, or its default there; `otherwise` if
    the target takes no such key.
    """
    parent, _, name = key.rpartition(".")
    return settings_of(get(config, parent)).get(name, otherwise)


def check(config: Config, facts: Facts) -> None:
    """Check a planned configuration as a whole: reject combinations of values that do not fit."""
    for each in by_student(config):
        _check_sizes(each)
        _check_channels(each, facts)
    _check_uses(config)
    if setting(config, "augment.where") == "worker" and facts.channels not in (1, 3):
        raise UserError(
            f"augment.where=worker: PIL does not support {facts.channels} channels; use device."
        )
    ranks = int(get(config, "trainer.devices")) * int(get(config, "trainer.num_nodes"))
    batch_size = get(config, "loader.batch_size")
    if batch_size % ranks:
        raise UserError(
            f"loader.batch_size={batch_size} is the total over all {ranks} processes and must be "
            "divisible by their number."
        )
    if config["method"].get("mixup") and ranks > 1 and batch_size // ranks % 2:
        raise UserError(
            f"loader.batch_size={batch_size}: method.mixup mixes pairs of images, so each of "
            f"{ranks} processes needs an even number of them."
        )
    devices = get(config, "trainer.devices")
    if facts.accelerator == "cuda" and devices > facts.num_devices:
        raise UserError(f"trainer.devices={devices}: this machine has only {facts.num_devices}.")
    if get(config, "trainer.compile") and not facts.compiler:
        raise UserError(
            "trainer.compile=true: torch.compile finds no C++ compiler (g++, or the one named by "
            "CXX; on a GPU also Triton); remove this setting."
        )
    _check_length(config, facts.num_images / batch_size)


def _check_sizes(config: Config) -> None:
    """Check that crops consist of whole patches."""
    patch, augment = setting(config, "backbone.patch_size", 1), config["augment"]
    keys = ["global_size", *["local_size"] * bool(augment["num_local"])]
    keys += [] if config.get("students") else ["gram_size"]  # which only a teacher sees
    does = "reduces images by" if traits_of(config).convolutional else "has patches of"
    for key in keys:
        size = augment.get(key) or patch  # null: no crops of that kind
        if size % patch:
            raise UserError(
                f"augment.{key}={size}: the network {does} {patch} pixels: set augment.{key}="
                f"{math.ceil(size / patch) * patch} or another multiple of {patch}, or choose "
                "another network (backbone=, backbone.patch_size=)."
            )


def _check_channels(config: Config, facts: Facts) -> None:
    """Check that backbone and normalization fit the number of channels."""
    in_chans = setting(config, "backbone.in_chans", facts.channels)
    if in_chans != facts.channels:
        raise UserError(
            f"backbone.in_chans={in_chans}: the images have {count(facts.channels, 'channel')}; "
            f"remove this setting, or set data.channels={in_chans}."
        )
    for name in ("mean", "std"):
        if len(values := config["normalize"].get(name, [])) != facts.channels:
            raise UserError(
                f"normalize.{name}={values}: must be a list of {count(facts.channels, 'number')}, "
                "one per channel, or auto."
            )


_TICKS = 10_000.0  # of a timed run, for comparing fractions
_SPANS = (
    *("warmup", "freeze_last_layer", "freeze_backbone", "backbone_ramp"),
    *("start_step", "every"),
)


def _check_length(config: Config, steps_per_epoch: float) -> None:
    """Check that exactly one length is given, and that no span exceeds it."""
    measures = ("max_epochs", "max_steps", "max_time")
    given = {key: config["trainer"][key] for key in measures if config["trainer"][key] is not None}
    if len(given) != 1:
        named = " and ".join(f"trainer.{key}={value}" for key, value in given.items())
        raise UserError(
            f"{named or 'The length of the run is not set'}: give exactly one of "
            "trainer.max_epochs, trainer.max_steps and trainer.max_time."
        )
    ((measure, length),) = given.items()
    for key, span in leaves(config):
        if key.rpartition(".")[2] not in _SPANS:
            continue
        if not isinstance(span, str):
            continue
        if measure == "max_time":
            raise UserError(
                f"{key}={span}: must be a fraction of the run with trainer.max_time, as in 0.1."
            )
        per = {
            "epoch": steps_per_epoch,
            "step": 1.0,
            "max_epochs": steps_per_epoch,
            "max_steps": 1.0,
        }
        count, unit = parse_span(span)
        if count * per[unit] > length * per[measure] * (1 + 1e-9):
            raise UserError(
                f"{key}={span} is longer than the run (trainer.{measure}={length}): shorten it."
            )
    steps: float = _TICKS  # of a timed run, whose spans are fractions
    if measure != "max_time":
        steps = length * {"max_epochs": steps_per_epoch}.get(measure, 1.0)
    at, optim = Progress(0, steps, steps_per_epoch), config["optim"]
    spans = {key: optim.get(key) or 0.0 for key in ("freeze_backbone", "backbone_ramp")}
    if all(spans.values()) and sum(span_steps(span, at) for span in spans.values()) > steps:
        freeze, ramp = spans.values()
        raise UserError(
            f"optim.freeze_backbone={freeze} and optim.backbone_ramp={ramp} are together longer "
            f"than the run (trainer.{measure}={length}): shorten one."
        )
