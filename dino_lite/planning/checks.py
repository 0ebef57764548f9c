"""Refuses, before a run is paid for, a configuration that would fail or mislead later."""

from __future__ import annotations

import re
from collections.abc import Callable

from dino_lite.config import Config, get, instantiate, leaves, locate
from dino_lite.contracts import Backbone, Traits, UserError
from dino_lite.machine import Facts
from dino_lite.methods.clock import seconds
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
    "memory",
    "compile",
}
# What the words of `preset` mean: so many images.
PRESETS = {"tiny": 2_000, "small": 20_000, "medium": 200_000, "large": 1_280_000}
# Whole numbers, and the least that makes sense.
WHOLE = {
    "augment.blur_kernel": 1,
    "augment.global_size": 1,
    "augment.gram_size": 1,
    "augment.local_size": 1,
    "augment.num_local": 0,
    "backbone.depth": 1,
    "backbone.embed_dim": 1,
    "backbone.image_size": 1,
    "backbone.in_chans": 1,
    "backbone.num_heads": 1,
    "backbone.num_registers": 0,
    "backbone.patch_size": 1,
    "data.channels": 1,
    "loader.batch_size": 1,
    "loader.num_workers": 0,
    "method.head.bottleneck_dim": 1,
    "method.head.hidden_dim": 1,
    "method.head.num_layers": 1,
    "method.head.num_prototypes": 0,
    "optim.max_skipped": 1,
    "seed": 0,
    "trainer.devices": 1,
    "trainer.max_steps": 1,
    "trainer.micro_batch_size": 0,
    "trainer.num_nodes": 1,
    "trainer.num_threads": 1,
}
NULLABLE = {
    "augment.blur_kernel",
    "augment.gram_size",
    "backbone.depth",
    "backbone.embed_dim",
    "backbone.num_heads",
    "backbone.num_registers",
    "trainer.max_epochs",
    "trainer.max_steps",
}
CHOICES: dict[str, tuple[object, ...]] = {
    **{
        f"augment.{kind}.quarter_turns": (True, False) for kind in ("global_1", "global_2", "local")
    },
    "augment.where": ("worker", "device"),
    "backbone.drop_path_by": ("sample", "batch"),
    "backbone.drop_path_uniform": (True, False),
    "backbone.mask_token": (True, False),
    "baselines": (True, False),
    "loader.draft": (True, False),
    "method.teacher_temp.per": ("step", "epoch"),
    "optim.clip_by": ("global", "module", "parameter"),
    "optim.decay_tokens": (True, False),
    "optim.freeze_by": ("gradient", "rate"),
    "optim.rate_rule": ("linear", "sqrt", "none"),
    "trainer.compile": (True, False),
    "trainer.memory": ("high", "normal", "low"),
}
# Numbers: which keys, what they may be, and how that is said.
NUMBERS: list[tuple[str, Callable[[float], bool], str]] = [
    (r".*_prob", lambda v: 0 <= v <= 1, "a probability lies in [0, 1]"),
    (r".*(teacher_temp\.(start|end)|student_temp)", lambda v: v > 0, "a temperature is positive"),
    (
        r"method\.(momentum\.(base|end|start)|center_momentum)",
        lambda v: 0 <= v <= 1,
        "a momentum lies in [0, 1]",
    ),
    (r"backbone\.drop_path", lambda v: 0 <= v < 1, "it lies in [0, 1)"),
    (r"loader\.max_bad_fraction", lambda v: 0 <= v <= 1, "a fraction lies in [0, 1]"),
    (r"optim\.layer_decay", lambda v: 0 < v <= 1, "it lies in (0, 1]"),
    (
        r"optim\.(rate|clip|patch_embed_scale|(learning_rate|weight_decay)\.(base|end|start))"
        r"|trainer\.max_epochs",
        lambda v: v >= 0,
        "this cannot be negative",
    ),
]


def check_values(config: Config) -> None:
    """Every value on its own: refuse the wrong kind and what is outside its range."""
    for key, value in leaves(config):
        if value == "auto" or (value is None and key in NULLABLE):
            continue
        if key in CHOICES and value not in CHOICES[key]:
            known = ", ".join(str(choice).lower() for choice in CHOICES[key])
            raise UserError(f"{key}={value}: choose one of {known}.")
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if key == "preset" and value not in PRESETS and not (number and value % 1 == 0 < value):
            words = ", ".join(PRESETS)
            raise UserError(f"preset={value}: choose auto, {words}, or a number of images.")
        if key in WHOLE and not (number and value % 1 == 0 and value >= WHOLE[key]):
            raise UserError(f"{key}={value}: a whole number from {WHOLE[key]} on is needed.")
        for pattern, allows, why in NUMBERS:
            if re.fullmatch(pattern, key) and not (number and allows(value)):
                raise UserError(f"{key}={value}: {why if number else 'a number is needed'}.")
    unknown = sorted(config["trainer"].keys() - TRAINER_KEYS)
    if unknown:
        known = ", ".join(sorted(TRAINER_KEYS))
        raise UserError(f"trainer.{unknown[0]}: there is no such key; known are {known}.")


def mixes_images(config: Config) -> bool:
    """Whether it changes results which images share a micro-batch: by batch normalization in head
    or backbone, or by a loss that says so in its `mixes_images`.
    """
    losses = instantiate(config["loss"]).values()
    across = any(getattr(loss, "mixes_images", False) for loss in losses)
    in_backbone = traits_of(config).mixes_images
    return bool(get(config, "method.head.batch_norm")) or in_backbone or across


def traits_of(config: Config) -> Traits:
    """What the backbone's class says of its settings."""
    settings = dict(config["backbone"])
    family = locate(target := settings.pop("_target_"))
    if not (isinstance(family, type) and issubclass(family, Backbone)):
        raise UserError(
            f"backbone._target_={target} must name a class derived from "
            "dino_lite.contracts.Backbone."
        )
    return family.traits(**settings)


def _check_uses(config: Config) -> None:
    """Every weight is read by a loss: else several processes would wait for its gradient."""
    if not config["loss"]:
        raise UserError("loss=[]: there is nothing to learn from; choose loss=[dino] or another.")
    method, reads = config["method"], {loss["reads"] for loss in config["loss"].values()}
    masks, of_patches = method.get("masking") is not None, {"patch", "patch_embedding"} & reads
    if masks and not of_patches:
        raise UserError(
            "method.masking: no loss reads masked patches; add one, or set method.masking=null."
        )
    heads = {"head": ("cls", True), "patch_head": ("patch", masks)}
    for name, (match, used) in heads.items():
        head = method.get(name)
        if used and head and head.get("num_prototypes") and match not in reads:
            if name == "head" and method.get("patch_head", 0) is None and "patch" in reads:
                continue  # its prototypes are the patches'
            raise UserError(
                f"method.{name}: no loss reads its prototypes; set "
                f"method.{name}.num_prototypes=0, or choose loss=[dino] or another that does."
            )
    serves = "head" if method.get("patch_head", 0) is None and masks else "patch_head"
    if (method.get(serves) or {}).get("batch_norm"):
        raise UserError(
            f"method.{serves}.batch_norm=true: masked patches differ in number, and one alone has "
            "no variance; leave it out."
        )
    if config["backbone"].get("mask_token") and not masks:
        raise UserError(
            "backbone.mask_token=true: method.masking masks nothing; leave it out, or choose "
            "method=dinov2."
        )


def check(config: Config, facts: Facts) -> None:
    """A planned configuration as a whole: refuse numbers that do not go together."""
    patch, large, small = (
        get(config, key)
        for key in ("backbone.patch_size", "augment.global_size", "augment.local_size")
    )
    sizes = {"augment.global_size": large}
    if get(config, "augment.num_local"):
        sizes["augment.local_size"] = small
    if gram := config["augment"].get("gram_size"):
        sizes["augment.gram_size"] = gram
    for key, size in sizes.items():
        if patch > size:
            raise UserError(f"backbone.patch_size={patch}: a patch is larger than {key}={size}.")
        if size % patch:
            raise UserError(f"{key}={size}: no multiple of backbone.patch_size={patch}.")
    _check_channels(config, facts)
    _check_uses(config)
    if get(config, "augment.where") == "worker" and facts.channels not in (1, 3):
        raise UserError(
            f"augment.where=worker: PIL has no images of {facts.channels} channels; use device."
        )
    ranks = int(get(config, "trainer.devices")) * int(get(config, "trainer.num_nodes"))
    batch_size = get(config, "loader.batch_size")
    if batch_size % ranks:
        raise UserError(
            f"loader.batch_size={batch_size}: it counts images over all {ranks} processes and must "
            "divide by them."
        )
    devices = get(config, "trainer.devices")
    if facts.accelerator == "cuda" and devices > facts.num_devices:
        raise UserError(f"trainer.devices={devices}: this machine has {facts.num_devices}.")
    precision = str(get(config, "trainer.precision"))
    if precision in ("16", "fp16", "16-mixed", "16-true"):
        raise UserError(f"trainer.precision={precision}: fp16 overflows in DINO; use bf16 or 32.")
    if precision not in ("32", "bf16", "64"):
        raise UserError(f"trainer.precision={precision}: choose auto, 32, bf16 or 64.")
    if get(config, "trainer.compile") and not facts.compiler:
        raise UserError(
            "trainer.compile=true: torch.compile finds no C++ compiler (g++, or what CXX names; on "
            "a GPU Triton as well); leave it out."
        )
    _check_length(config, facts.num_images / batch_size)


def _check_channels(config: Config, facts: Facts) -> None:
    """The backbone and the normalization take the images as they are."""
    in_chans = get(config, "backbone.in_chans")
    if in_chans != facts.channels:
        raise UserError(
            f"backbone.in_chans={in_chans}: the images have {facts.channels} channels; leave it "
            f"out, or set data.channels={in_chans}."
        )
    for key in ("normalize.mean", "normalize.std"):
        values = get(config, key)
        numbers = isinstance(values, list) and all(
            isinstance(v, int | float) and not isinstance(v, bool) for v in values
        )
        if not numbers or len(values) != facts.channels:
            raise UserError(
                f"{key}={values}: a list of {facts.channels} numbers is needed, one for each "
                "channel, or auto."
            )


def _check_length(config: Config, steps_per_epoch: float) -> None:
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
        if key.rpartition(".")[2] not in ("warmup", "freeze_last_layer", "start_step", "every"):
            continue
        if span is None:
            continue
        check_span(span, key)
        if not isinstance(span, str):
            continue
        if measure == "max_time":
            raise UserError(
                f"{key}={span}: a run measured by trainer.max_time knows fractions only, as 0.1."
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
