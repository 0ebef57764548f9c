"""Golden cases B16 and B17: DINOv2's parameter groups, its schedules, the rate of its frozen last
layer.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dino_lite.backbones.vit import ViT
from dino_lite.config import Config, compose, instantiate
from dino_lite.contracts import Progress, Schedule
from dino_lite.losses.prototype import PrototypeLoss
from dino_lite.methods.dino import DINO, Student
from dino_lite.methods.step import Step
from dino_lite.nn.heads import DINOHead
from dino_lite.optim.param_groups import param_groups
from dino_lite.optim.schedules import Constant, scale_rate
from golden.adapters_core import crops_of
from golden.adapters_vit import our_name
from golden.check import Bound, Check, bound, compare

Case = dict[str, Any]
Tensors = dict[str, Tensor]


@functools.cache
def optim_config() -> Config:
    """The group `optim` with DINOv2's switches."""
    switches = ("freeze_by=rate", "clip_by=module", "rate_rule=sqrt")
    config: Config = compose("pretrain", ["compat=dino", *(f"optim.{s}" for s in switches)])
    return dict(config["optim"])


def build_student(names: list[str], depth: int) -> Student:
    """A student whose backbone has the parts that are in `names`."""
    swiglu = any(".mlp.w12." in name for name in names)
    backbone = ViT(
        image_size=16,
        patch_size=8,
        embed_dim=8,
        depth=depth,
        num_heads=2,
        num_registers=4 if "register_tokens" in names else 0,
        mask_token="mask_token" in names,
        init_values=0.1,
        mlp="swiglu" if swiglu else "gelu",
    )
    return Student(backbone, DINOHead(8, 12, 8, 4, 3, learn_norm=True))


def b16(case: Case, tensors: Tensors, folder: Path) -> Iterator[Check]:
    """Factors of rate and decay, the last layer's mark, the number of groups, by name."""
    for variant, wanted in case["data"].items():
        part = "head." if variant.startswith("dino_head") else "backbone."
        student = build_student(list(wanted["params"]), wanted.get("depth", 1))
        groups = param_groups(
            student,
            decay_tokens=optim_config()["decay_tokens"],
            layer_decay=wanted["layerwise_decay"],
            patch_embed_scale=wanted["patch_embed_lr_mult"],
            freeze_by=optim_config()["freeze_by"],
        )
        found = {n.removeprefix(part): g for g in groups for n in g["names"] if n.startswith(part)}
        params = {our_name(name): values for name, values in wanted["params"].items()}
        yield Check(f"{variant}.names", float(len(found.keys() ^ params.keys())), 0.0)
        for name in found.keys() & params.keys():
            group, values, label = found[name], params[name], f"{variant}.{name}"
            scale = values["lr_multiplier"]
            yield compare(f"{label}.rate", group["rate_scale"], scale, Bound(rtol=1e-12))
            yield Check(f"{label}.decay", abs(group["decay"] - values["wd_multiplier"]), 0.0)
            last = float(group["last_layer"] != values["is_last_layer"])
            yield Check(f"{label}.last_layer", last, 0.0)
        num_groups = len({id(group) for group in found.values()})
        yield Check(f"{variant}.groups", float(num_groups != wanted["n_fused_groups"]), 0.0)


def cosine(hyper: Case) -> Schedule:
    """The cosine of a case, in the reference's words."""
    schedule: Schedule = instantiate(
        optim_config()["learning_rate"]
        | {
            "base": hyper["base_value"],
            "end": hyper["final_value"],
            "start": hyper.get("start_warmup_value", 0.0),
            "warmup": f"{hyper.get('warmup_iters', 0)} steps",
        }
    )
    return schedule


def b17(case: Case, tensors: Tensors, folder: Path) -> Iterator[Check]:
    """Every schedule at every step and beyond the last, those of a training, and the rate's
    scaling.
    """
    limit = bound(case["tolerance"]["f64"])

    def check(name: str, found: list[float]) -> Check:
        return compare(name, torch.tensor(found, dtype=torch.float64), tensors[name], limit)

    for variant, hyper in case["hyper"]["sets"].items():
        name, schedule = f"{variant}/out64.schedule_to_total_plus3", cosine(hyper)
        # Frozen steps come before a run of what is left; the training below has none.
        frozen, total = hyper.get("freeze_iters", 0), hyper["total_iters"]
        steps = range(len(tensors[name]) - frozen)
        values = [schedule(Progress(i, total - frozen, total)) for i in steps]
        yield check(name, [0.0] * frozen + values)
    for kind, values in training(case["hyper"]["training_cfg"]).items():
        yield check(f"training/out64.{kind}", values)
    for row in case["data"]["lr_scaling_sqrt_wrt_1024"]:
        size = row["batch_size_per_gpu"] * row["world_size"]
        rate = scale_rate(row["base_lr"], size, optim_config()["rate_rule"])
        yield compare(f"rate of {size}", rate, row["lr"], limit)


def training(hyper: Case) -> dict[str, list[float]]:
    """All schedules of a run, by the reference's names: rates as `Step` writes them."""
    optim, teacher = hyper["optim"], hyper["teacher"]
    per_epoch = hyper["train"]["OFFICIAL_EPOCH_LENGTH"]
    rate = {
        "base_value": optim["lr"],
        "final_value": optim["min_lr"],
        "warmup_iters": optim["warmup_epochs"] * per_epoch,
    }
    config = compose("pretrain", ["compat=dino"])["method"]
    momentum = {"base": teacher["momentum_teacher"], "end": teacher["final_momentum_teacher"]}
    temp = {
        "start": teacher["warmup_teacher_temp"],
        "end": teacher["teacher_temp"],
        "warmup": f"{teacher['warmup_teacher_temp_epochs']} epochs",
        "per": "step",
    }
    schedules: dict[str, Schedule] = {
        "momentum": instantiate(config["momentum"] | momentum),
        "teacher_temp": instantiate(config["teacher_temp"] | temp),
    }
    decay = {"base_value": optim["weight_decay"], "final_value": optim["weight_decay_end"]}
    step = tiny_step(cosine(rate), cosine(decay), f"{optim['freeze_last_layer_epochs']} epochs")
    total, crops = optim["epochs"] * per_epoch, crops_of(torch.randn(2, 2, 3, 8, 8), None)
    found: dict[str, list[float]] = {n: [] for n in ("lr", "last_layer_lr", "wd", *schedules)}
    for i in range(total):
        at = Progress(i, total, per_epoch)
        step(crops, at)
        decayed = [group for group in step.optimizer.param_groups if group["decay"]]
        rates = {group["last_layer"]: group["lr"] for group in decayed}
        found["lr"].append(rates[False])
        found["last_layer_lr"].append(rates[True])
        found["wd"].append(decayed[0]["weight_decay"])
        for name, schedule in schedules.items():
            found[name].append(schedule(at))
    return found


def tiny_step(rate: Schedule, decay: Schedule, freeze: str) -> Step:
    """A step of the smallest network, with DINOv2's switches."""
    backbone = ViT(image_size=8, patch_size=8, embed_dim=4, depth=1, num_heads=1)
    head = partial(DINOHead, num_prototypes=4, hidden_dim=4, bottleneck_dim=4)
    method = DINO(backbone, head, momentum=Constant(0.99), teacher_temp=Constant(0.04))
    config = optim_config()
    groups = param_groups(method.student, freeze_by=config["freeze_by"])
    return Step(
        method,
        {"dino": PrototypeLoss("cls", Constant(1.0))},
        instantiate(config["optimizer"])(groups),
        learning_rate=rate,
        weight_decay=decay,
        clip_by=config["clip_by"],
        freeze_last_layer=freeze,
    )
