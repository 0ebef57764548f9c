"""One rule for every key that may be "auto": computes its value, and the reason, from the facts of
data and machine.

A rule reads the configuration as earlier rules have left it.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from dino_lite.config import Config, get, instantiate
from dino_lite.contracts import UserError
from dino_lite.data.photometric import IMAGENET_MEAN, IMAGENET_STD
from dino_lite.machine import Facts
from dino_lite.methods.clock import Clock
from dino_lite.optim.schedules import scale_rate
from dino_lite.planning import presets
from dino_lite.planning.checks import mixes_images, setting, traits_of
from dino_lite.wording import count

_SIDES = {"cpu": [(48, 32), (10**9, 64)], "gpu": [(48, 32), (96, 64), (160, 128), (10**9, 224)]}
_PATCHES = {32: 4, 64: 8, 96: 8, 128: 16, 224: 16}


def _global_size(config: Config, facts: Facts) -> tuple[int, str]:
    side = min(facts.height, facts.width)
    sizes = _SIDES["cpu" if facts.accelerator == "cpu" else "gpu"]
    size = next(size for limit, size in sizes if side <= limit)
    patch = setting(config, "backbone.patch_size")
    if isinstance(patch, int) and 0 < 2 * patch <= size and not traits_of(config).convolutional:
        size = round(size / patch) * patch
    images = facts.sizes or f"{facts.width}x{facts.height} pixels"
    return size, f"images are {images} and train on {_device(facts)}"


def _device(facts: Facts) -> str:
    return "this CPU" if facts.accelerator == "cpu" else facts.device_name


def _blur_radius(config: Config, facts: Facts) -> tuple[list[float], str]:
    scale = get(config, "augment.global_size") / 224
    return [
        round(0.1 * scale, 4),
        round(2.0 * scale, 4),
    ], "DINO's 0.1 to 2 pixels for crops of 224, in proportion"


def _where(config: Config, facts: Facts) -> tuple[str, str]:
    if facts.channels not in (1, 3):
        return "device", f"PIL does not support {facts.channels} channels"
    if facts.accelerator == "cpu" and facts.num_cores > 1:
        return "worker", "the loader makes the crops while the model trains"
    return "device", "crops are made in batches, many times faster than one by one"


def _patch_size(config: Config, facts: Facts) -> tuple[int, str]:
    size = get(config, "augment.global_size")
    if traits_of(config).convolutional:
        return max(1, size // 8), "makes an 8x8 feature map of a global crop"
    if facts.source == "shapes":
        return 8, "the period of the patterns; 16 patches are fast"
    patch = next((p for s, p in sorted(_PATCHES.items()) if size <= s), 16)
    patch = patch if size % patch == 0 else math.gcd(size, 16)
    return patch, f"{(size // patch) ** 2} patches per global crop"


def _local_size(config: Config, facts: Facts) -> tuple[int, str]:
    traits, size = traits_of(config), get(config, "augment.global_size")
    patch = setting(config, "backbone.patch_size", 1)
    if traits.convolutional and traits.small:
        return max(patch, size // 2 // patch * patch), "half the global crop"
    return max(patch, round(size * 96 / 224 / patch) * patch), "3/7 of the global crop, as in DINO"


def _by_channel(facts: Facts, usual: Any, measured: Any) -> tuple[list[float], str]:
    if facts.channels == 3:
        return list(usual), "ImageNet's, as published weights expect"
    return list(measured), "measured on a sample of the images"


def _num_heads(config: Config, facts: Facts) -> tuple[int | None, str]:
    width = setting(config, "backbone.embed_dim")
    return (
        (None, "as in the named model")
        if width is None
        else (max(1, width // 32), "heads of 32 channels")
    )


def _hidden_dim(config: Config, facts: Facts) -> tuple[int, str]:
    return (256, "a small head for a CPU") if facts.accelerator == "cpu" else (2048, "as in DINO")


def _bottleneck_dim(config: Config, facts: Facts) -> tuple[int, str]:
    return (64, "a small head for a CPU") if facts.accelerator == "cpu" else (256, "as in DINO")


def _mask_token(config: Config, facts: Facts) -> tuple[bool, str]:
    if config["method"].get("masking"):
        return True, "the method masks patches"
    return False, "the method masks no patches"


def _batch_size(config: Config, facts: Facts) -> tuple[int, str]:
    devices = get(config, "trainer.devices") * get(config, "trainer.num_nodes")
    if facts.accelerator == "cpu":
        size, why = 64, "images per step: on a CPU, more steps matter more than larger batches"
    else:
        size, why = min(1024, 256 * devices), "images per step: 256 per device, 1024 at most"
    return max(devices, size // devices * devices), why


def _num_workers(config: Config, facts: Facts) -> tuple[int, str]:
    devices = get(config, "trainer.devices")
    if facts.accelerator == "cpu":
        if facts.num_cores == 1:
            return 0, "the only core trains and loads"
        num = max(1, facts.num_cores // (4 * devices))
        return num, f"of {facts.num_cores} cores, most are left to the model"
    num = max(1, facts.num_cores // devices - 1)
    return num, f"to keep the device busy, on {count(facts.num_cores, 'core')}"


def _num_threads(config: Config, facts: Facts) -> tuple[int, str]:
    # Two threads that shared two cores with a loader took up to seven times as long per step as
    # one. Independent of the number of workers: the number of threads changes the order of
    # summation, hence rounding, and resuming must be bit-exact.
    own = facts.num_cores // get(config, "trainer.devices")
    why = f"of {facts.num_cores} cores, one is left to the loader"
    return max(1, own - 1), why if own > 1 else "one core per process"


def _learning_rate(config: Config, facts: Facts) -> tuple[float, str]:
    rate, size, rule = (
        get(config, k) for k in ("optim.rate", "loader.batch_size", "optim.rate_rule")
    )
    times = config["optim"].get("rate_scale", 1.0)
    scaled = f" times optim.rate_scale={times:g}" if times != 1 else ""
    why = f"optim.rate={rate}{scaled} scaled to {count(size, 'image')} per step, {rule}"
    return scale_rate(float(rate) * times, size, rule), why


def _constant(schedule: str) -> Any:
    """A rule that sets the end of a schedule to its base."""
    return lambda config, facts: (
        get(config, f"{schedule}.base"),
        "constant: the value of its base",
    )


def _warmup(config: Config, facts: Facts) -> tuple[float, str]:
    return 0.1, "a tenth of the run, as DINO's 10 of 100 epochs"


def _freeze(config: Config, facts: Facts) -> tuple[float, str]:
    return 0.01, "a hundredth of the run, as DINO's 1 of 100 epochs"


def _queue_size(config: Config, facts: Facts) -> tuple[int, str]:
    size = 2 ** math.ceil(math.log2(max(facts.num_images, 1) / 8))
    return min(8192, max(16, size)), "an eighth of the images, from 16 to 8,192"


def _vit_sizes(config: Config) -> tuple[int, int, int] | None:
    """Width, depth and tokens per global crop of a transformer of dino_lite, None for any other
    backbone. A named model is built on the meta device, without memory for its weights.
    """
    backbone = config["backbone"]
    if not str(backbone["_target_"]).startswith("dino_lite.") or traits_of(config).convolutional:
        return None
    width, depth = backbone.get("embed_dim"), backbone.get("depth")
    if width is None or depth is None:
        try:
            with torch.device("meta"), torch.random.fork_rng(devices=[]):
                built = instantiate({k: v for k, v in backbone.items() if k != "pretrained"})
        except UserError:
            return None  # building it for the run raises the same error
        width, depth = built.embed_dim, built.num_blocks
    return width, depth, _num_tokens(config, "augment.global_size")


def _num_tokens(config: Config, size: str) -> int:
    """Tokens per crop: its patches and the class token."""
    return int((get(config, size) // setting(config, "backbone.patch_size", 1)) ** 2) + 1


# Activations per global crop between two blocks (tokens x width) below which matrix products are
# too small to benefit from bfloat16 on a CPU (docs/performance.md).
_SMALL_CROP = 2000


def _precision(config: Config, facts: Facts) -> tuple[str, str]:
    if not facts.bf16:
        return "32", f"{_device(facts)} is not faster in bfloat16"
    width = config["backbone"].get("embed_dim")
    values = 0 if width is None else width * _num_tokens(config, "augment.global_size")
    if facts.accelerator == "cpu" and 0 < values < _SMALL_CROP:
        return "32", "too small a network to benefit from bfloat16 on a CPU"
    return "bf16", f"{_device(facts)} is faster in bfloat16"


_KEPT = 320 * 2**20  # bytes of saved activations above which a CPU splits a batch
_KEPT_BYTES = {"bf16": 30, "32": 48, "64": 96}  # saved per block, per activation between blocks


def _micro_batch_size(config: Config, facts: Facts) -> tuple[int, str]:
    sizes = None if facts.accelerator != "cpu" or mixes_images(config) else _vit_sizes(config)
    if sizes is None:
        return 0, "the whole batch at once"
    width, depth, tokens = sizes
    local_tokens = get(config, "augment.num_local") * _num_tokens(config, "augment.local_size")
    ranks = get(config, "trainer.devices") * get(config, "trainer.num_nodes")
    num_images = get(config, "loader.batch_size") // ranks
    value = _KEPT_BYTES.get(str(get(config, "trainer.precision")), 48)
    num_parts = math.ceil(num_images * (2 * tokens + local_tokens) * depth * width * value / _KEPT)
    if num_parts <= 1:
        return 0, "the whole batch at once"
    images = math.ceil(num_images / num_parts)
    return images, f"the batch in {math.ceil(num_images / images)} parts, to save memory"


# Compiling takes one to three minutes and makes steps about 10 % faster (docs/performance.md).
_COMPILED_STEPS, _COMPILED_SECONDS = 5000, 3600


def _compile(config: Config, facts: Facts) -> tuple[bool, str]:
    if not facts.compiler:
        return False, "no C++ compiler was found"
    if traits_of(config).convolutional:
        return False, "only a transformer's blocks are compiled"
    if facts.accelerator == "cpu" and get(config, "trainer.precision") != "bf16":
        return False, "saves only 2 % in float32, and compiling takes a minute"
    run = Clock.of(config["trainer"], facts.num_images, get(config, "loader.batch_size"))
    if (run.max_seconds or 0) < _COMPILED_SECONDS and (run.num_steps or 0) < _COMPILED_STEPS:
        return False, "the run is too short to recover the compile time"
    return True, "a minute of compiling, then faster steps"


def _baselines(config: Config, facts: Facts) -> tuple[bool, str]:
    few = facts.num_images <= 100_000
    return (
        few,
        "measured at the end, in minutes" if few else "would take hours: use dino-lite evaluate",
    )


RULES: dict[str, Any] = {
    "normalize.mean": lambda c, f: _by_channel(f, IMAGENET_MEAN, f.mean),
    "normalize.std": lambda c, f: _by_channel(f, IMAGENET_STD, f.std),
    "backbone.in_chans": lambda c, f: (f.channels, "the channels of the images"),
    "baselines": _baselines,
    "trainer.accelerator": lambda c, f: (
        f.accelerator,
        "torch finds no GPU"
        if f.accelerator == "cpu"
        else f"the best device here: {f.device_name}",
    ),
    "augment.global_size": _global_size,
    "backbone.patch_size": _patch_size,
    "augment.local_size": _local_size,
    **presets.RULES,
    "augment.where": _where,
    "backbone.num_heads": _num_heads,
    **{f"augment.{kind}.blur_radius": _blur_radius for kind in ("global_1", "global_2", "local")},
    "backbone.image_size": lambda c, f: (get(c, "augment.global_size"), "the size of global crops"),
    "method.head.hidden_dim": _hidden_dim,
    "method.head.bottleneck_dim": _bottleneck_dim,
    **{
        f"method.patch_head.{size}": lambda c, f, size=size: (
            setting(c, f"method.head.{size}"),
            "same as the head for class tokens",
        )
        for size in ("num_prototypes", "hidden_dim", "bottleneck_dim")
    },
    "method.queue_size": _queue_size,
    "backbone.mask_token": _mask_token,
    "method.momentum.end": _constant("method.momentum"),
    "loader.batch_size": _batch_size,
    "loader.num_workers": _num_workers,
    "trainer.num_threads": _num_threads,
    "trainer.precision": _precision,
    "trainer.compile": _compile,
    "trainer.micro_batch_size": _micro_batch_size,
    "optim.learning_rate.base": _learning_rate,
    "optim.learning_rate.warmup": _warmup,
    "optim.learning_rate.end": _constant("optim.learning_rate"),
    "optim.weight_decay.end": _constant("optim.weight_decay"),
    "optim.freeze_last_layer": _freeze,
}
