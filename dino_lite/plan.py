"""Settles every key that says "auto" from the facts of the data and the machine, and refuses what cannot work."""

from __future__ import annotations

import math
import os
import re
from typing import Any, NamedTuple

import torch

from dino_lite.config import Config, get, leaves, put
from dino_lite.contracts import Facts, Splits, UserError
from dino_lite.data.facts import read_facts
from dino_lite.optim.schedules import check_span, scale_rate


class Decision(NamedTuple):
    """One key that was settled, and why."""

    key: str
    value: Any
    reason: str


class Plan(NamedTuple):
    """A configuration without "auto", and how it came about."""

    config: Config
    decisions: list[Decision]

    def table(self) -> str:
        """The decisions as lines of text."""
        width = max((len(f"{d.key}={d.value}") for d in self.decisions), default=0)
        return "\n".join(f"  {f'{d.key}={d.value}':{width}}  {d.reason}" for d in self.decisions)


def gather_facts(config: Config, splits: Splits) -> Facts:
    """Look at the data and at this machine."""
    data = read_facts(splits)
    wanted = pick_accelerator(get(config, "trainer.accelerator"), "trainer.accelerator")
    return Facts(
        source=splits.name,
        num_images=data.num_images,
        num_test=data.num_test,
        num_classes=data.num_classes,
        height=data.height,
        width=data.width,
        accelerator=wanted,
        device_name=torch.cuda.get_device_name() if wanted == "cuda" else wanted,
        num_devices=torch.cuda.device_count() if wanted == "cuda" else 1,
        num_cores=num_cores(),
        bf16=_fast_bf16(wanted),
    )


def pick_accelerator(asked: str, key: str) -> str:
    """"cpu", "cuda" or "mps": what `key` asks for, or the best there is."""
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    found = {"cuda": cuda, "gpu": cuda, "mps": mps, "cpu": True, "auto": True}
    if asked not in found:
        raise UserError(f"{key}={asked}: choose auto, cpu, cuda or mps.")
    if not found[asked]:
        raise UserError(f"{key}={asked}: torch finds no such device here; use auto or cpu.")
    best = "cuda" if cuda else "mps" if mps else "cpu"
    return {"auto": best, "gpu": "cuda"}.get(asked, asked)


def num_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _fast_bf16(accelerator: str) -> bool:
    """Whether bfloat16 matrix products are native; emulated ones were 150 times slower than float32."""
    if accelerator == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return accelerator == "cpu" and any(getattr(torch.cpu, p, lambda: False)() for p in probes)


def plan(config: Config, facts: Facts) -> Plan:
    """Pure: the same configuration and facts give the same plan. Rules are tried in order and may read earlier ones."""
    decisions: list[Decision] = []
    for key, rule in _RULES.items():
        if get(config, key) == "auto":
            value, reason = rule(config, facts)
            config = put(config, key, value)
            decisions.append(Decision(key, value, reason))
    left = [key for key, value in leaves(config) if value == "auto" and key not in _OWN_AUTO]
    if left:
        raise UserError(f"{left[0]}=auto: nothing settles this key; give it a value.")
    check(config, facts)
    return Plan(config, decisions)


_OWN_AUTO = {"name", "data.labels"}
_SIDES = {"cpu": [(48, 32), (10**9, 64)], "gpu": [(48, 32), (96, 64), (160, 128), (10**9, 224)]}
_PATCHES = {32: 4, 64: 8, 96: 8, 128: 16, 224: 16}


def _global_size(config: Config, facts: Facts) -> tuple[int, str]:
    side = min(facts.height, facts.width)
    sizes = _SIDES["cpu" if facts.accelerator == "cpu" else "gpu"]
    size = next(size for limit, size in sizes if side <= limit)
    return size, f"images are about {facts.width}x{facts.height} and train on {facts.accelerator}"


def _patch_size(config: Config, facts: Facts) -> tuple[int, str]:
    size = get(config, "augment.global_size")
    patch = next((p for s, p in sorted(_PATCHES.items()) if size <= s), 16)
    patch = patch if size % patch == 0 else math.gcd(size, 16)
    return patch, f"{(size // patch) ** 2} patches a global crop"


def _local_size(config: Config, facts: Facts) -> tuple[int, str]:
    size, patch = get(config, "augment.global_size"), get(config, "backbone.patch_size")
    return max(patch, round(size * 96 / 224 / patch) * patch), "3/7 of the global crop, as in the paper"


def _num_local(config: Config, facts: Facts) -> tuple[int, str]:
    if facts.accelerator == "cpu":
        return 6, "fewer than the paper's 8, for a CPU"
    return 8, "the paper's"


def _backbone_name(config: Config, facts: Facts) -> tuple[str, str]:
    if facts.accelerator == "cpu":
        return "vit", "a small ViT that a CPU trains in minutes"
    return "vit_small_patch16_224", "the paper's smallest"


def _embed_dim(config: Config, facts: Facts) -> tuple[int | None, str]:
    return (192, "3 heads of 64") if get(config, "backbone.name") == "vit" else (None, "the model's own")


def _depth(config: Config, facts: Facts) -> tuple[int | None, str]:
    return (6, "half a ViT-Ti") if get(config, "backbone.name") == "vit" else (None, "the model's own")


def _num_heads(config: Config, facts: Facts) -> tuple[int | None, str]:
    width = get(config, "backbone.embed_dim")
    return (None, "the model's own") if width is None else (max(1, width // 64), "64 wide each")


def _num_prototypes(config: Config, facts: Facts) -> tuple[int, str]:
    steps = [(20_000, 1024), (100_000, 4096), (500_000, 16_384)]
    value = next((k for limit, k in steps if facts.num_images <= limit), 65_536)
    return value, f"for {facts.num_images:,} images"


def _hidden_dim(config: Config, facts: Facts) -> tuple[int, str]:
    return (512, "a small head for a CPU") if facts.accelerator == "cpu" else (2048, "the paper's")


def _bottleneck_dim(config: Config, facts: Facts) -> tuple[int, str]:
    return (128, "a small head for a CPU") if facts.accelerator == "cpu" else (256, "the paper's")


def _momentum(config: Config, facts: Facts) -> tuple[float, str]:
    # .99 up to 20,000 images, .996 (the paper's) from a million on, on a log scale between.
    low, high = math.log(20_000), math.log(1_280_000)
    part = min(1.0, max(0.0, (math.log(max(facts.num_images, 1)) - low) / (high - low)))
    return round(0.99 + 0.006 * part, 4), "a short run's teacher must follow faster than the paper's .996"


def _teacher_temp(config: Config, facts: Facts) -> tuple[float, str]:
    return 0.04, "the paper's default; 0.07 pays in runs of 300 epochs"


def _batch_size(config: Config, facts: Facts) -> tuple[int, str]:
    devices = max(1, int(get(config, "trainer.devices"))) * max(1, int(get(config, "trainer.num_nodes")))
    if facts.accelerator == "cpu":
        size, why = 64, "many steps count more than large ones on a CPU"
    else:
        size, why = min(1024, 256 * devices), "256 a device, 1024 at most"
    return max(devices, size // devices * devices), why


def _num_workers(config: Config, facts: Facts) -> tuple[int, str]:
    devices = max(1, int(get(config, "trainer.devices")))
    if facts.accelerator == "cpu":
        spare = 1 if facts.num_cores > 1 else 0
        return max(spare, facts.num_cores // (4 * devices)), f"{facts.num_cores} cores, most of them for the model"
    return max(1, facts.num_cores // devices - 1), f"{facts.num_cores} cores"


def _max_time(config: Config, facts: Facts) -> tuple[str | None, str]:
    lengths_given = get(config, "trainer.max_epochs") != "auto" or get(config, "trainer.max_steps") is not None
    if lengths_given or facts.accelerator != "cpu":
        return None, "the run is measured in epochs or steps"
    return ("4m" if facts.source == "shapes" else "30m"), "a CPU run is measured by the clock"


def _max_epochs(config: Config, facts: Facts) -> tuple[int | None, str]:
    if get(config, "trainer.max_time") is not None or get(config, "trainer.max_steps") is not None:
        return None, "the run is measured otherwise"
    steps = [(20_000, 800), (200_000, 400), (1_000_000, 200)]
    epochs = next((e for limit, e in steps if facts.num_images <= limit), 100)
    return epochs, f"for {facts.num_images:,} images"


def _learning_rate(config: Config, facts: Facts) -> tuple[float, str]:
    rate, size, rule = (get(config, k) for k in ("optim.rate", "loader.batch_size", "optim.rate_rule"))
    return scale_rate(float(rate), size, rule), f"{rate} scaled to {size} images a step, {rule}"


def _warmup(config: Config, facts: Facts) -> tuple[float, str]:
    return 0.1, "a tenth of the run, the paper's 10 of 100 epochs"


def _freeze(config: Config, facts: Facts) -> tuple[float, str]:
    return 0.01, "a hundredth of the run, the paper's 1 of 100 epochs"


def _precision(config: Config, facts: Facts) -> tuple[str, str]:
    if facts.bf16:
        return "bf16", f"{facts.device_name} multiplies bfloat16 natively"
    return "32", f"no native bfloat16 on {facts.device_name}"


_RULES: dict[str, Any] = {
    "trainer.accelerator": lambda c, f: (f.accelerator, f"the best device here: {f.device_name}"),
    "augment.global_size": _global_size,
    "backbone.patch_size": _patch_size,
    "augment.local_size": _local_size,
    "augment.num_local": _num_local,
    "backbone.name": _backbone_name,
    "backbone.embed_dim": _embed_dim,
    "backbone.depth": _depth,
    "backbone.num_heads": _num_heads,
    "backbone.image_size": lambda c, f: (get(c, "augment.global_size"), "the global crop"),
    "method.head.num_prototypes": _num_prototypes,
    "method.head.hidden_dim": _hidden_dim,
    "method.head.bottleneck_dim": _bottleneck_dim,
    "method.momentum.base": _momentum,
    "method.teacher_temp.end": _teacher_temp,
    "loader.batch_size": _batch_size,
    "loader.num_workers": _num_workers,
    "trainer.max_time": _max_time,
    "trainer.max_epochs": _max_epochs,
    "trainer.precision": _precision,
    "optim.learning_rate.base": _learning_rate,
    "optim.learning_rate.warmup": _warmup,
    "optim.freeze_last_layer": _freeze,
}


_TRAINER_KEYS = {
    "accelerator", "devices", "num_nodes", "max_epochs", "max_steps", "max_time", "precision", "micro_batch_size",
}  # fmt: skip


def check(config: Config, facts: Facts) -> None:
    """Refuse, in one sentence, what would fail or mislead later."""
    number = {key: value for key, value in leaves(config) if isinstance(value, int | float)}

    def refuse(wrong: bool, key: str, why: str) -> None:
        if wrong:
            raise UserError(f"{key}={get(config, key)}: {why}")

    for key in ("augment.global_size", "augment.local_size", "backbone.patch_size", "loader.batch_size",
                "method.head.num_prototypes", "trainer.devices", "trainer.num_nodes"):  # fmt: skip
        refuse(key in number and (number[key] < 1 or number[key] % 1 != 0), key, "a whole number from 1 on is needed.")
    for key, value in number.items():
        refuse(key.endswith("_prob") and not 0 <= value <= 1, key, "a probability lies in [0, 1].")
        temperature = "teacher_temp." in key or key.endswith("student_temp")
        refuse(temperature and key.rpartition(".")[2] != "warmup" and value <= 0, key, "a temperature is positive.")
        refuse(key.startswith("method.momentum.") and not 0 <= value <= 1, key, "a momentum lies in [0, 1].")
        refuse(value < 0 and key.startswith(("optim.", "loader.", "trainer.", "augment.num_")), key, "this cannot be negative.")
    patch, large, small = (get(config, k) for k in ("backbone.patch_size", "augment.global_size", "augment.local_size"))
    refuse(patch > large or (get(config, "augment.num_local") > 0 and patch > small), "backbone.patch_size",
           f"a patch is larger than a crop (global {large}, local {small} pixels).")  # fmt: skip
    for key in ("augment.global_size", "augment.local_size"):
        refuse(get(config, key) % patch != 0, key, f"no multiple of backbone.patch_size={patch}.")
    ranks = int(get(config, "trainer.devices")) * int(get(config, "trainer.num_nodes"))
    refuse(get(config, "loader.batch_size") % ranks != 0, "loader.batch_size",
           f"it counts images over all {ranks} processes and must divide by them.")  # fmt: skip
    precision = str(get(config, "trainer.precision"))
    refuse(precision in ("16", "fp16", "16-mixed"), "trainer.precision", "fp16 overflows in DINO; use bf16 or 32.")
    refuse(precision not in ("32", "bf16", "64"), "trainer.precision", "choose auto, 32, bf16 or 64.")
    unknown = sorted(config["trainer"].keys() - _TRAINER_KEYS)
    if unknown:
        refuse(True, f"trainer.{unknown[0]}", f"there is no such key; known are {', '.join(sorted(_TRAINER_KEYS))}.")
    _check_length(config)


def _check_length(config: Config) -> None:
    """Exactly one measure of the run's length, and every warm-up within it."""
    given = {key: value for key in ("max_epochs", "max_steps", "max_time") if (value := config["trainer"][key]) is not None}
    if len(given) != 1:
        names = " and ".join(f"trainer.{key}={value}" for key, value in given.items()) or "no length"
        raise UserError(f"{names}: give exactly one of trainer.max_epochs, max_steps and max_time.")
    (measure, length), = given.items()
    if measure == "max_time":
        seconds(length)
    elif not isinstance(length, int | float) or length <= 0:
        raise UserError(f"trainer.{measure}={length}: a positive number is needed.")
    for key, span in leaves(config):
        if key.rpartition(".")[2] not in ("warmup", "freeze_last_layer"):
            continue
        check_span(span, key)
        if isinstance(span, str) and measure == "max_time":
            raise UserError(f'{key}={span}: a run measured by trainer.max_time knows fractions only, as 0.1.')
        unit = {"max_epochs": "epoch", "max_steps": "step"}.get(measure, "")
        if isinstance(span, str) and unit in span and float(span.split()[0]) > float(length):
            raise UserError(f"{key}={span} is longer than the run (trainer.{measure}={length}): shorten it.")


def seconds(duration: str | float) -> float:
    """"90s", "30m", "2h", "1d" or a number of minutes, in seconds."""
    match = re.fullmatch(r"\s*([0-9.]+)\s*([smhd]?)\s*", str(duration))
    if match is None or float(match[1]) <= 0:
        raise UserError(f'trainer.max_time={duration}: write a positive time as "90s", "30m" or "2h".')
    return float(match[1]) * {"s": 1, "m": 60, "": 60, "h": 3600, "d": 86_400}[match[2]]
