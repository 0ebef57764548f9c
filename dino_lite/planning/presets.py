"""Settings that depend on the number of images and the family of the backbone: `preset=`.

`preset=auto` uses the number of images in the data; a name of `groups.PRESETS` stands for a fixed
number. KEY=VALUE overrides any of the settings. They follow the logarithm of the number of images:
momentum is interpolated between published recipes, prototypes and epochs change at thresholds that
are about evenly spaced on that scale.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from dino_lite.config import Config, config_dir, get, load
from dino_lite.machine import Facts
from dino_lite.planning.checks import traits_of
from dino_lite.planning.groups import PRESETS

FEW, MANY = 20_000, 1_280_000  # images: the largest small set, and ImageNet


Rule = Callable[[Config, Facts], tuple[Any, str]]  # gives the value of a key, and the reason


class Choice(NamedTuple):
    """A choice in a config group: its name, its content, and the reason."""

    name: str
    node: Config
    reason: str


def num_images(config: Config) -> int:
    """The number of images that `preset` stands for."""
    preset = get(config, "preset")
    return PRESETS.get(preset) or int(preset)


def on_log_scale(num: int, low: float, high: float) -> float:
    """`low` up to FEW images, `high` from MANY, interpolated in log(num) between them."""
    part = (math.log(max(num, 1)) - math.log(FEW)) / (math.log(MANY) - math.log(FEW))
    return low + (high - low) * min(1.0, max(0.0, part))


def choose_backbone(config: Config, facts: Facts) -> Choice | None:
    """The convnet of conf/backbone if it suits data and machine, else None: a ViT. None as well if
    any setting of the backbone was given.
    """
    folder = config_dir() / "backbone"
    if config["backbone"] != load(folder / "auto.yaml"):
        return None
    masks = config["method"].get("masking") is not None  # not supported by a convnet
    if facts.accelerator != "cpu" or facts.source == "shapes" or masks:
        return None
    reason = f"{num_images(config):,} images on a CPU: learns in minutes there, unlike a ViT"
    return Choice("convnet", load(folder / "convnet.yaml"), reason)


def _global_scale(config: Config, facts: Facts) -> tuple[list[float], str]:
    traits = traits_of(config)
    if not traits.convolutional:
        return [0.4, 1.0], "DINO's"
    if traits.small:
        return [0.6, 1.0], "large crops, for a short run"
    return [0.14, 1.0], "DINO's for a ResNet-50"


def _local_scale(config: Config, facts: Facts) -> tuple[list[float], str]:
    traits = traits_of(config)
    if not traits.convolutional:
        return [0.05, 0.4], "DINO's"
    if traits.small:
        return [0.2, 0.6], "up to the smallest global crop"
    return [0.05, 0.14], "DINO's for a ResNet-50"


def _num_local(config: Config, facts: Facts) -> tuple[int, str]:
    if facts.accelerator == "cpu":
        return 4, "half of DINO's 8, for a CPU"
    return 8, "DINO's"


def _backbone_name(config: Config, facts: Facts) -> tuple[str, str]:
    names = traits_of(config).names
    if names is None:
        return "auto", "no rule"  # plan() rejects it
    if facts.accelerator == "cpu":
        return names[0], "a small ViT that trains in minutes on a CPU"
    return names[1], "the smallest of the paper"


def _embed_dim(config: Config, facts: Facts) -> tuple[int | None, str]:
    if not traits_of(config).small:
        return None, "the model's own"
    return (64, "for patterns") if facts.source == "shapes" else (128, "for a CPU")


def _depth(config: Config, facts: Facts) -> tuple[int | None, str]:
    if not traits_of(config).small:
        return None, "the model's own"
    return (2, "for patterns") if facts.source == "shapes" else (4, "for a CPU")


def _init_values(config: Config, facts: Facts) -> tuple[float | None, str]:
    if traits_of(config).small:
        return 0.0, "no LayerScale: a small network behind 1e-5 learned nothing in 700 steps"
    return None, "the model's own"


def _drop_path(config: Config, facts: Facts) -> tuple[float, str]:
    traits = traits_of(config)
    if traits.small:
        return 0.0, "a small network underfits"
    if not traits.drop_path:
        return 0.0, "not supported by this network"
    return 0.1, "DINO's"


def usual_rate(config: Config, facts: Facts) -> float:
    """The default of `optim.rate` for the chosen optimizer (conf/optim)."""
    optimizer = config["optim"]["optimizer"]["_target_"].rpartition(".")[2]
    usual = {"LARS": 0.3, "SGD": 0.03}
    return usual[optimizer] if optimizer in usual else _rate(config, facts)[0]


def _rate(config: Config, facts: Facts) -> tuple[float, str]:
    traits = traits_of(config)
    if not traits.small:
        return 5e-4, "DINO's"
    width = None if traits.convolutional else config["backbone"].get("embed_dim")
    rate = round(0.512 / width, 6) if width else 4e-3
    return rate, "higher than DINO's, for a short run of a narrow network"


def _num_prototypes(config: Config, facts: Facts) -> tuple[int, str]:
    num = num_images(config)
    steps = [(5_000, 512), (20_000, 1024), (100_000, 4096), (500_000, 16_384)]
    return next((k for limit, k in steps if num <= limit), 65_536), f"for {num:,} images"


def _momentum(config: Config, facts: Facts) -> tuple[float, str]:
    value = round(on_log_scale(num_images(config), 0.99, 0.996), 4)
    if value == 0.996:
        return value, "DINO's"
    return value, "below DINO's 0.996: in a short run the teacher must follow faster"


def _teacher_temp(config: Config, facts: Facts) -> tuple[float, str]:
    return 0.04, "DINO's default; 0.07 is better in runs of 300 epochs"


def _max_time(config: Config, facts: Facts) -> tuple[str | None, str]:
    lengths_given = (
        get(config, "trainer.max_epochs") != "auto" or get(config, "trainer.max_steps") is not None
    )
    if lengths_given or facts.accelerator != "cpu":
        return None, "the run is limited by epochs or steps"
    return ("4m" if facts.source == "shapes" else "30m"), "runs on a CPU are limited by time"


def _max_epochs(config: Config, facts: Facts) -> tuple[int | None, str]:
    if get(config, "trainer.max_time") is not None or get(config, "trainer.max_steps") is not None:
        return None, "the run is limited by time or steps"
    num = num_images(config)
    steps = [(20_000, 800), (200_000, 400), (1_000_000, 200)]
    return next((e for limit, e in steps if num <= limit), 100), f"for {num:,} images"


SIZE: dict[str, Rule] = {
    "preset": lambda c, f: (f.num_images, "the number of images; or tiny, small, medium, large")
}
# Applied after the crop sizes and before the settings that depend on the device.
RULES: dict[str, Rule] = {
    "augment.num_local": _num_local,
    "backbone.name": _backbone_name,
    "backbone.embed_dim": _embed_dim,
    "backbone.depth": _depth,
    "backbone.init_values": _init_values,
    "backbone.drop_path": _drop_path,
    "augment.global_scale": _global_scale,
    "augment.local_scale": _local_scale,
    "optim.rate": _rate,
    "method.head.num_prototypes": _num_prototypes,
    "method.momentum.base": _momentum,
    "method.teacher_temp.end": _teacher_temp,
    "trainer.max_time": _max_time,
    "trainer.max_epochs": _max_epochs,
}
