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
from dino_lite.wording import count

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
    images = count(num_images(config), "image")
    reason = f"a small network: on a CPU it learns from {images} in minutes, unlike a ViT"
    return Choice("convnet", load(folder / "convnet.yaml"), reason)


def _global_scale(config: Config, facts: Facts) -> tuple[list[float], str]:
    traits = traits_of(config)
    if not traits.convolutional:
        return [0.4, 1.0], "share of the image in a global crop, as in DINO"
    if traits.small:
        return [0.6, 1.0], "share of the image in a global crop: large, for a short run"
    return [0.14, 1.0], "share of the image in a global crop, as in DINO's ResNet-50"


def _local_scale(config: Config, facts: Facts) -> tuple[list[float], str]:
    traits = traits_of(config)
    if not traits.convolutional:
        return [0.05, 0.4], "share of the image in a local crop, as in DINO"
    if traits.small:
        return [0.2, 0.6], "share of the image in a local crop, up to the smallest global one"
    return [0.05, 0.14], "share of the image in a local crop, as in DINO's ResNet-50"


def _num_local(config: Config, facts: Facts) -> tuple[int, str]:
    if facts.accelerator == "cpu":
        return 4, "local crops per image: half of DINO's 8, since a CPU is slow"
    return 8, "local crops per image, as in DINO"


def _backbone_name(config: Config, facts: Facts) -> tuple[str, str]:
    names = traits_of(config).names
    if names is None:
        return "auto", "no rule"  # plan() rejects it
    if facts.accelerator == "cpu":
        return names[0], "a small ViT that trains in minutes on a CPU"
    return names[1], "the smallest network of DINO's paper"


def _embed_dim(config: Config, facts: Facts) -> tuple[int | None, str]:
    if not traits_of(config).small:
        return None, "as in the named model"
    return (
        (64, "enough for the embedded images")
        if facts.source == "shapes"
        else (128, "small enough for a CPU")
    )


def _depth(config: Config, facts: Facts) -> tuple[int | None, str]:
    if not traits_of(config).small:
        return None, "as in the named model"
    return (
        (2, "enough for the embedded images")
        if facts.source == "shapes"
        else (4, "small enough for a CPU")
    )


def _init_values(config: Config, facts: Facts) -> tuple[float | None, str]:
    if traits_of(config).small:
        return (
            0.0,
            "no LayerScale: starting from 1e-5, a small network learned nothing in 700 steps",
        )
    return None, "as in the named model"


def _drop_path(config: Config, facts: Facts) -> tuple[float, str]:
    traits = traits_of(config)
    if traits.small:
        return 0.0, "no regularization: a small network underfits anyway"
    if not traits.drop_path:
        return 0.0, "this network has no stochastic depth"
    return 0.1, "as in DINO"


def usual_rate(config: Config, facts: Facts) -> float:
    """The default of `optim.rate` for the chosen optimizer (conf/optim)."""
    optimizer = config["optim"]["optimizer"]["_target_"].rpartition(".")[2]
    usual = {"LARS": 0.3, "SGD": 0.03}
    return usual[optimizer] if optimizer in usual else _rate(config, facts)[0]


def _rate(config: Config, facts: Facts) -> tuple[float, str]:
    traits = traits_of(config)
    if not traits.small:
        return 5e-4, "as in DINO"
    width = None if traits.convolutional else config["backbone"].get("embed_dim")
    rate = round(0.512 / width, 6) if width else 4e-3
    return rate, "higher than DINO's 0.0005, for a short run of a narrow network"


def _num_prototypes(config: Config, facts: Facts) -> tuple[int, str]:
    num = num_images(config)
    steps = [(5_000, 512), (20_000, 1024), (100_000, 4096), (500_000, 16_384)]
    value = next((k for limit, k in steps if num <= limit), 65_536)
    return value, f"DINO has 65,536 for a million images; this suits {count(num, 'image')}"


def _momentum(config: Config, facts: Facts) -> tuple[float, str]:
    value = round(on_log_scale(num_images(config), 0.99, 0.996), 4)
    if value == 0.996:
        return value, "as in DINO"
    return value, "below DINO's 0.996: in a short run the teacher must follow faster"


def _teacher_temp(config: Config, facts: Facts) -> tuple[float, str]:
    return 0.04, "as in DINO; 0.07 is better in runs of 300 epochs"


def _max_time(config: Config, facts: Facts) -> tuple[str | None, str]:
    lengths_given = (
        get(config, "trainer.max_epochs") != "auto" or get(config, "trainer.max_steps") is not None
    )
    if lengths_given or facts.accelerator != "cpu":
        return None, "no limit: the run ends after its epochs or steps"
    return ("4m" if facts.source == "shapes" else "30m"), "on a CPU a run ends after this time"


def _max_epochs(config: Config, facts: Facts) -> tuple[int | None, str]:
    if get(config, "trainer.max_time") is not None or get(config, "trainer.max_steps") is not None:
        return None, "no limit: the run ends after its time or steps"
    num = num_images(config)
    steps = [(20_000, 800), (200_000, 400), (1_000_000, 200)]
    value = next((e for limit, e in steps if num <= limit), 100)
    return value, f"suits {count(num, 'image')}: the fewer there are, the more often each is seen"


SIZE: dict[str, Rule] = {
    "preset": lambda c, f: (
        f.num_images,
        "the number of your images, which the choices below suit; or tiny, small, medium, large",
    )
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
