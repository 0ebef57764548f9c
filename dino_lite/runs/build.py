"""Builds the parts of a run from its planned configuration; writes nothing."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, cast

import pytorch_lightning as pl
import torch

from dino_lite.backbones.blocks import set_memory
from dino_lite.config import Config, instantiate
from dino_lite.contracts import Splits, Tokens, Trust
from dino_lite.data.datamodule import DataModule
from dino_lite.machine import Facts
from dino_lite.methods.clock import Clock
from dino_lite.methods.module import PretrainModule
from dino_lite.methods.retention import Retention, Unadapted
from dino_lite.methods.step import Step
from dino_lite.methods.stillness import train_last_blocks
from dino_lite.optim.param_groups import groups_of_students, param_groups
from dino_lite.optim.schedules import scale_rate
from dino_lite.planning.checks import by_student, is_penalty
from dino_lite.planning.groups import Loader, Optim, Trainer
from dino_lite.planning.presets import usual_rate
from dino_lite.runs.begin import build_method, without_start
from dino_lite.runs.run import Run
from dino_lite.runs.teacher import begins_as_teacher, frozen_files, open_teacher

_FAR = 10.0  # times the usual learning rate


def build(
    config: Config,
    facts: Facts,
    splits: Splits,
    run: Run,
    trust: Trust = (),
    resuming: bool = False,
) -> tuple[DataModule, PretrainModule, list[pl.Callback]]:
    """Build the data module, the training module and the callbacks; if `resuming`, without reading
    the weights that the run began with, unless a loss needs them.
    """
    loader, module = Loader(**config["loader"]), build_module(config, facts, trust, resuming)
    datamodule = DataModule(
        splits,
        instantiate(config["augment"]),
        instantiate(config["normalize"]),
        **loader._asdict(),
        seed=config["seed"],
        num_steps=module.clock.num_steps,
        bad_files=run.folder / "bad_files.csv",
    )
    double = str(config["trainer"]["precision"]) == "64"
    datamodule.dtype = torch.float64 if double else torch.float32
    callbacks = [instantiate(node) for node in (config["callbacks"] or {}).values() if node]
    return datamodule, module, callbacks


def build_module(
    config: Config, facts: Facts, trust: Trust = (), resuming: bool = False
) -> PretrainModule:
    """Build the module of method and step, with the clock of the run."""
    trainer, optim = Trainer(**config["trainer"]), Optim(**config["optim"])
    teacher, start = open_teacher(config, trust, any_channels=True), None
    if any(map(is_penalty, config["loss"].values())) and not config.get("students"):
        start = cast(Any, build_method(config, trust).student).backbone.requires_grad_(False)
    method = build_method(config | without_start(config) if resuming else config, trust)
    if optim.last_blocks is not None:
        train_last_blocks(method.student, optim.last_blocks)
    held: Callable[..., Tokens] | None = None if config.get("students") else teacher
    if held is not None and config.get("adapter") and begins_as_teacher(config):
        held = Unadapted(cast(Any, method.student).backbone)
    step = functools.partial(
        Step,
        losses=instantiate(config["loss"]),
        learning_rate=instantiate(config["optim"]["learning_rate"]),
        weight_decay=instantiate(config["optim"]["weight_decay"]),
        clip=optim.clip,
        clip_by=optim.clip_by,
        freeze_last_layer=optim.freeze_last_layer,
        freeze_backbone=optim.freeze_backbone,
        backbone_ramp=optim.backbone_ramp,
        max_skipped=optim.max_skipped,
        rate_doubt=_rate_doubt(config, facts),
        micro_batch_size=trainer.micro_batch_size,
        autocast=torch.bfloat16 if trainer.precision == "bf16" else None,
        seed=config["seed"],
        retention=None if held is None else Retention(held),
        start=start,
    )
    rates = {
        name: usual_rate(each, facts) / usual_rate(config, facts)
        for name, each in zip(config.get("students") or {}, by_student(config), strict=False)
    }
    groups = functools.partial(
        functools.partial(groups_of_students, scales=rates) if rates else param_groups,
        decay_tokens=optim.decay_tokens,
        layer_decay=optim.layer_decay,
        patch_embed_scale=optim.patch_embed_scale,
        freeze_by=optim.freeze_by,
        backbone_apart=optim.backbone_ramp != 0,
    )
    set_memory(method, trainer.memory, trainer.compile)
    clock = Clock.of(config["trainer"], facts.num_images, config["loader"]["batch_size"])
    optimizer = instantiate(config["optim"]["optimizer"])
    module = PretrainModule(method, step, optimizer, clock, groups, frozen_files(config), held)
    module.bare_step()  # raises UserError now if the parts do not fit
    return module


def _rate_doubt(config: Config, facts: Facts) -> str | None:
    """A phrase if the learning rate is more than ten times the usual one."""
    optim, usual = config["optim"], usual_rate(config, facts)
    scaled = scale_rate(usual, config["loader"]["batch_size"], optim["rate_rule"])
    base = optim["learning_rate"].get("base")
    rate = optim["rate"] * optim.get("rate_scale", 1.0)
    keys = (("rate", rate, usual), ("learning_rate.base", base, scaled))
    for key, value, default in keys:
        if isinstance(value, int | float) and value > _FAR * default:
            times = f"{value / default:,.0f} times the usual {default:g}"
            return f"lower optim.{key} ({value:g} is {times})"
    return None
