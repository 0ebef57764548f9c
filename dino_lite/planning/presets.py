"""What follows from how much data there is, and of which family the backbone is: `preset=`.

`preset=auto` goes by the number of images there are; a word of `checks.PRESETS` takes the settings
of a set of that size. Each of them can be given as KEY=VALUE all the same. All goes by the
logarithm of that number: momentum is read off between sizes of published recipes, prototypes and
epochs change in steps that are about even on it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from dino_lite.config import Config, config_dir, get, load
from dino_lite.machine import Facts
from dino_lite.planning.checks import PRESETS, traits_of

FEW, MANY = 20_000, 1_280_000  # up to here a set is small; ImageNet


Rule = Callable[[Config, Facts], tuple[Any, str]]  # what a key becomes, and why


class Choice(NamedTuple):
    """A file of a group of conf/, what stands in it, and why."""

    name: str
    node: Config
    reason: str


def num_images(config: Config) -> int:
    """How many the settings are meant for."""
    preset = get(config, "preset")
    return PRESETS.get(preset) or int(preset)


def on_log_scale(num: int, low: float, high: float) -> float:
    """`low` up to FEW images, `high` from MANY on, between them in proportion to log(num)."""
    part = (math.log(max(num, 1)) - math.log(FEW)) / (math.log(MANY) - math.log(FEW))
    return low + (high - low) * min(1.0, max(0.0, part))


def choose_backbone(config: Config, facts: Facts) -> Choice | None:
    """Of conf/backbone, where nothing was asked of it; None: it stays what it is, a ViT."""
    folder = config_dir() / "backbone"
    if config["backbone"] != load(folder / "auto.yaml"):
        return None
    masks = config["method"].get("masking") is not None  # which a convnet cannot
    if facts.accelerator != "cpu" or facts.source == "shapes" or masks:
        return None
    reason = f"{num_images(config):,} images on a CPU: it learns there in minutes, a ViT does not"
    return Choice("convnet", load(folder / "convnet.yaml"), reason)


def _global_scale(config: Config, facts: Facts) -> tuple[list[float], str]:
    traits = traits_of(config)
    if not traits.convolutional:
        return [0.4, 1.0], "DINO's"
    if traits.small:
        return [0.6, 1.0], "a short run learns what is alike in large parts"
    return [0.14, 1.0], "DINO's for a ResNet-50"


def _local_scale(config: Config, facts: Facts) -> tuple[list[float], str]:
    traits = traits_of(config)
    if not traits.convolutional:
        return [0.05, 0.4], "DINO's"
    if traits.small:
        return [0.2, 0.6], "up to where global crops begin"
    return [0.05, 0.14], "DINO's for a ResNet-50"


def _num_local(config: Config, facts: Facts) -> tuple[int, str]:
    if facts.accelerator == "cpu":
        return 4, "half of DINO's 8, for a CPU"
    return 8, "DINO's"


def _backbone_name(config: Config, facts: Facts) -> tuple[str, str]:
    names = traits_of(config).names
    if names is None:
        return "auto", "no rule"  # plan() refuses it
    if facts.accelerator == "cpu":
        return names[0], "a small ViT that a CPU trains in minutes"
    return names[1], "the paper's smallest"


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
        return 0.0, "this network has none"
    return 0.1, "DINO's"


def _rate(config: Config, facts: Facts) -> tuple[float, str]:
    traits = traits_of(config)
    if not traits.small:
        return 5e-4, "DINO's"
    width = None if traits.convolutional else config["backbone"].get("embed_dim")
    rate = round(0.512 / width, 6) if width else 4e-3
    return rate, "a short run of a narrow network takes more than DINO's"


def _num_prototypes(config: Config, facts: Facts) -> tuple[int, str]:
    num = num_images(config)
    steps = [(5_000, 512), (20_000, 1024), (100_000, 4096), (500_000, 16_384)]
    return next((k for limit, k in steps if num <= limit), 65_536), f"for {num:,} images"


def _momentum(config: Config, facts: Facts) -> tuple[float, str]:
    value = round(on_log_scale(num_images(config), 0.99, 0.996), 4)
    if value == 0.996:
        return value, "DINO's"
    return value, "a short run's teacher must follow faster than DINO's .996"


def _teacher_temp(config: Config, facts: Facts) -> tuple[float, str]:
    return 0.04, "DINO's default; 0.07 pays in runs of 300 epochs"


def _max_time(config: Config, facts: Facts) -> tuple[str | None, str]:
    lengths_given = (
        get(config, "trainer.max_epochs") != "auto" or get(config, "trainer.max_steps") is not None
    )
    if lengths_given or facts.accelerator != "cpu":
        return None, "the run is measured in epochs or steps"
    return ("4m" if facts.source == "shapes" else "30m"), "a CPU run is measured by the clock"


def _max_epochs(config: Config, facts: Facts) -> tuple[int | None, str]:
    if get(config, "trainer.max_time") is not None or get(config, "trainer.max_steps") is not None:
        return None, "the run is measured otherwise"
    num = num_images(config)
    steps = [(20_000, 800), (200_000, 400), (1_000_000, 200)]
    return next((e for limit, e in steps if num <= limit), 100), f"for {num:,} images"


SIZE: dict[str, Rule] = {
    "preset": lambda c, f: (f.num_images, "settings for so many; or tiny, small, medium, large")
}
# Settled after the sizes of crops and before what hangs on the device.
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
