"""Golden cases A01 to A08: DINO's head, loss, schedules, groups, clipping, ViT, crops and whole
steps, by public code.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dino_lite.backbones.vit import ViT
from dino_lite.config import Config, compose, instantiate, put
from dino_lite.contracts import Crops, Progress
from dino_lite.methods.dino import DINO, Student
from dino_lite.methods.step import Step
from dino_lite.nn.heads import DINOHead
from dino_lite.optim.param_groups import clip_gradients_, param_groups
from dino_lite.optim.schedules import scale_rate
from golden.check import Bound, Case, Check, Tensors, below, bound, compare

_PRECISIONS = ((torch.float64, "f64", "64"), (torch.float32, "f32", ""))
# grad64r and out64r are float64 results stored in float32: half a unit in the last place is theirs.
_STORED_ROUNDED = 6e-8


@functools.cache
def compat_config() -> Config:
    """The configuration of a pretraining run under compat=dino."""
    return compose("pretrain", ["compat=dino"])


def build_head(hyper: Case, **override: Any) -> DINOHead:
    """Our head with the case's sizes, in the reference's words."""
    hyper = hyper | override
    return DINOHead(
        hyper["in_dim"],
        hyper["out_dim"],
        hidden_dim=hyper["hidden_dim"],
        bottleneck_dim=hyper["bottleneck_dim"],
        num_layers=hyper.get("nlayers", 3),
        batch_norm=hyper.get("use_bn", False),
        learn_norm=not hyper.get("norm_last_layer", True),
    )


def build_vit(hyper: Case) -> ViT:
    """Our ViT with the case's sizes, positions resampled as compat=dino does."""
    switches = compat_config()["backbone"]
    return ViT(
        "vit",
        hyper["img_size"],
        hyper["patch_size"],
        hyper["in_chans"],
        hyper["drop_path"],
        switches["position_offset"],
        switches["position_antialias"],
        embed_dim=hyper["embed_dim"],
        depth=hyper["depth"],
        num_heads=hyper["num_heads"],
        mlp_ratio=hyper["mlp_ratio"],
        qkv_bias=hyper["qkv_bias"],
        norm_layer=functools.partial(nn.LayerNorm, eps=hyper["layer_norm_eps"]),
    )


def gradient_bound(tolerance: str, gradients: list[Tensor]) -> Bound:
    """The bound for gradients; "max|grad|" is the largest of all, since some (a bias before a batch
    norm) are zero.
    """
    limit, largest = bound(tolerance, "gradients"), max(float(g.abs().max()) for g in gradients)
    return Bound(limit.rtol + _STORED_ROUNDED, limit.atol + limit.scale * largest)


def a01(case: Case, tensors: Tensors, folder: Path) -> Iterator[Check]:
    """Head: logits in train and eval mode, gradients, running statistics."""
    for variant, hyper in case["hyper"]["variants"].items():
        own = below(tensors, f"{variant}/")
        for dtype, precision, suffix in _PRECISIONS:
            tolerance = case["tolerance"][precision]
            values = bound(tolerance)
            head = build_head(case["hyper"], **hyper)
            head.load_state_dict(below(own, "w."))
            head = head.to(dtype).train()
            x = own["in.x"].to(dtype).requires_grad_()
            train = head(x) @ head.prototypes().rows().T
            train.backward(own["in.grad_out"].to(dtype))
            label = f"{variant}.{precision}"
            yield compare(f"{label}.train", train, own[f"out{suffix}.train"], values)
            wanted = below(own, "grad64r.")
            slopes = gradient_bound(tolerance, [own["grad64.x"], *wanted.values()])
            yield compare(f"{label}.grad.x", x.grad, own[f"grad{suffix}.x"], slopes)
            gradients = {name: p.grad for name, p in head.named_parameters() if p.grad is not None}
            yield Check(f"{label}.grad names", float(gradients.keys() != wanted.keys()), 0.0)
            for name in wanted.keys() & gradients.keys():
                yield compare(f"{label}.grad.{name}", gradients[name], wanted[name], slopes)
            for name, after in below(own, f"out{suffix}.after.").items():
                yield compare(f"{label}.after.{name}", head.state_dict()[name], after, values)
            scored = head.eval()(x) @ head.prototypes().rows().T
            yield compare(f"{label}.eval", scored, own[f"out{suffix}.eval"], values)


def a03(case: Case, tensors: Tensors, folder: Path) -> Iterator[Check]:
    """Schedules of compat=dino at every step, the teacher temperature at every epoch, and the
    rate's scaling.
    """
    limit, config = bound(case["tolerance"]["f64"]), compat_config()
    for name, hyper in case["hyper"]["cosine"].items():
        schedule = instantiate(
            config["optim"]["learning_rate"]
            | {
                "base": hyper["base_value"],
                "end": hyper["final_value"],
                "start": hyper["start_warmup_value"],
                "warmup": f"{hyper['warmup_epochs']} epochs",
            }
        )
        total = hyper["epochs"] * hyper["niter_per_ep"]
        found = [schedule(Progress(i, total, hyper["niter_per_ep"])) for i in range(total)]
        wanted = tensors[f"{name}/out64.schedule"]
        yield compare(name, torch.tensor(found, dtype=torch.float64), wanted, limit)
    for name, hyper in case["hyper"]["teacher_temp"].items():
        found = [temperature(config, hyper, epoch) for epoch in range(hyper["nepochs"])]
        wanted = tensors[f"{name}/out64.schedule"]
        yield compare(name, torch.tensor(found, dtype=torch.float64), wanted, limit)
    for row in case["data"]["lr_scaling"]:
        rate = scale_rate(
            row["lr"], row["batch_size_per_gpu"] * row["world_size"], config["optim"]["rate_rule"]
        )
        yield compare(
            f"rate of {row['batch_size_per_gpu']}x{row['world_size']}", rate, row["scaled"], limit
        )


def temperature(config: Config, hyper: Case, epoch: int) -> float:
    """The teacher temperature of compat=dino in an epoch, with a case's numbers."""
    schedule = instantiate(
        config["method"]["teacher_temp"]
        | {
            "start": hyper["warmup_teacher_temp"],
            "end": hyper["teacher_temp"],
            "warmup": f"{hyper['warmup_teacher_temp_epochs']} epochs",
        }
    )
    value: float = schedule(Progress(epoch, hyper["nepochs"], 1))
    return value


def a04(case: Case, tensors: Tensors, folder: Path) -> Iterator[Check]:
    """Names of decayed, exempt and frozen parameters, by variant "normlast{0,1}_bn{0,1}"."""
    decay_tokens = compat_config()["optim"]["decay_tokens"]
    for variant, wanted in case["data"].items():
        switches = {"norm_last_layer": "normlast1" in variant, "use_bn": "bn1" in variant}
        head = build_head(case["hyper"]["head"], **switches)
        student = Student(build_vit(case["hyper"]["vit"]), head)
        groups = param_groups(student, decay_tokens=decay_tokens)
        names = {group["decay"]: set(group["names"]) for group in groups}
        frozen = {name for name, p in student.named_parameters() if not p.requires_grad}
        for label, found, key in (
            ("decayed", names[True], "regularized"),
            ("exempt", names[False], "not_regularized"),
            ("frozen", frozen, "excluded_frozen"),
        ):
            yield Check(f"{variant}.{label}", float(len(found ^ set(wanted[key]))), 0.0)


def a05(case: Case, tensors: Tensors, folder: Path) -> Iterator[Check]:
    """Clipping by parameter, dropping of last-layer gradients, AdamW: planted gradients through
    Step.
    """
    hyper, order = case["hyper"], case["data"]["param_order"]
    for dtype, precision, suffix in _PRECISIONS:
        limit = bound(case["tolerance"][precision])
        method = trajectory_method(hyper, below(tensors, "w."), dtype)
        parameters = dict(method.student.named_parameters())
        planted: Tensors = {}

        def plant(loss: Tensor, parameters=parameters, planted=planted) -> None:  # type: ignore[no-untyped-def]
            for name, gradient in planted.items():
                parameters[name].grad = gradient.clone()

        step = trajectory_step(method, hyper | {"weight_decay_end": hyper["weight_decay"]}, plant)
        for i, epoch in enumerate(hyper["epoch_of_step"]):
            planted.update({n: g.to(dtype) for n, g in below(tensors, f"in.grad.step{i}.").items()})
            clipped = [planted[name].clone() for name in order]
            norms = torch.stack([gradient.norm() for gradient in clipped])
            yield compare(
                f"{precision}.norms{i}",
                norms,
                tensors[f"out{suffix}.norms_before_clip.step{i}"],
                limit,
            )
            clip_gradients_([[gradient] for gradient in clipped], hyper["clip"])
            wanted = below(tensors, f"out{suffix}.clipped.step{i}.")
            for name, gradient in zip(order, clipped, strict=True):
                if name in wanted:
                    yield compare(f"{precision}.clipped{i}.{name}", gradient, wanted[name], limit)
            epochs = len(hyper["epoch_of_step"])
            step(dummy_crops(hyper, dtype), Progress(epoch, epochs, 1))
            dropped = {name for name in order if parameters[name].grad is None}
            yield Check(
                f"{precision}.dropped{i}",
                float(dropped != set(case["data"]["grads_dropped_at_step"][str(i)])),
                0.0,
            )
            for name, value in below(tensors, f"out{suffix}.params.step{i}.").items():
                yield compare(f"{precision}.params{i}.{name}", parameters[name], value, limit)


def a06(case: Case, tensors: Tensors, folder: Path) -> Iterator[Check]:
    """ViT at every size: tokens, positions, last attention, penultimate block, gradients."""
    for (height, width), (dtype, precision, suffix) in itertools.product(
        case["hyper"]["sizes_hw"], _PRECISIONS
    ):
        own, tolerance = below(tensors, f"{height}x{width}/"), case["tolerance"][precision]
        limit = bound(tolerance)
        rounded = Bound(
            limit.rtol + _STORED_ROUNDED, limit.atol + (1e-9 if dtype == torch.float64 else 0)
        )
        vit = build_vit(case["hyper"]["vit"])
        vit.load_state_dict(below(tensors, "w."))
        vit.to(dtype)
        images = own["in.x_i8"].to(dtype) / 32
        tokens = vit(images)
        label = f"{height}x{width}.{precision}"
        yield compare(f"{label}.cls", tokens.cls, own[f"out{suffix}.cls"], limit)
        joined = torch.cat([tokens.cls[:, None], tokens.patches], dim=1)
        yield compare(f"{label}.tokens", joined, own[f"out{suffix}.tokens_norm"], limit)
        yield compare(
            f"{label}.positions", vit.positions(tokens.grid), own["out64.pos_embed"], limit
        )
        before = own.get("out64.tokens_before_block0")
        if before is not None:
            yield compare(f"{label}.embedding", vit.embed(images)[0], before, limit)
        attention = own["out64r.last_selfattention_img0"]
        yield compare(
            f"{label}.attention",
            vit.attention(images)[0, :, : attention.shape[1]],
            attention,
            rounded,
        )
        middle = vit.intermediate(images, [-2])[0]
        joined = torch.cat([middle.cls[:, None], middle.patches], dim=1)
        yield compare(f"{label}.penultimate", joined, own["out64r.penultimate_norm"], rounded)
        wanted = below(own, "grad64.")
        if wanted:
            (tokens.cls * tensors["in.grad_cls"].to(dtype)).sum().backward()
            slopes = gradient_bound(tolerance, list(wanted.values()))
            for name, value in wanted.items():
                yield compare(f"{label}.grad.{name}", vit.get_parameter(name).grad, value, slopes)


def a07(case: Case, tensors: Tensors, folder: Path) -> Iterator[Check]:
    """Crops of mixed sizes through backbone and head: one backbone call a run of equal sizes, rows
    in crop order.
    """
    for dtype, precision, suffix in _PRECISIONS:
        limit = bound(case["tolerance"][precision])
        head = build_head(case["hyper"]["head"])
        network = Student(build_vit(case["hyper"]["vit"]), head)
        network.load_state_dict(below(tensors, "w."))
        network.to(dtype)
        for variant, sizes in case["data"]["crop_sizes"].items():
            crops = [
                tensors[f"in.pool{size}_i8"][index].to(dtype) / 32
                for size, index in zip(sizes, case["data"]["pool_index"][variant], strict=True)
            ]
            groups = [
                torch.stack(list(run))
                for _, run in itertools.groupby(crops, key=lambda crop: crop.shape)
            ]
            logits = (network(groups) @ head.prototypes().rows().T).flatten(0, 1)
            features = torch.cat([network.backbone(group.flatten(0, 1)).cls for group in groups])
            yield compare(
                f"{variant}.{precision}.logits",
                logits,
                tensors[f"{variant}/out{suffix}.logits"],
                limit,
            )
            yield compare(
                f"{variant}.{precision}.features",
                features,
                tensors[f"{variant}/out{suffix}.features"],
                limit,
            )


def a08(case: Case, tensors: Tensors, folder: Path) -> Iterator[Check]:
    """Steps of the whole loop under compat=dino: losses, centers, gradient norms, student and
    teacher weights.
    """
    for (variant, switches), (dtype, precision, suffix) in itertools.product(
        case["hyper"]["variants"].items(), _PRECISIONS
    ):
        hyper, tolerance = case["hyper"] | switches, case["tolerance"][precision]
        hyper["clip"] = hyper["clip_grad"]
        hyper["head"] = hyper["head"] | {"norm_last_layer": hyper["norm_last_layer"]}
        own, label = below(tensors, f"{variant}/"), f"{variant}.{precision}"
        method = trajectory_method(hyper, below(tensors, "w.init."), dtype)
        norms: list[Tensor] = []

        trained = [
            method.student.get_parameter(n) for n in case["data"]["variants"][variant]["trainable"]
        ]

        def backward(loss: Tensor, trained=trained, norms=norms) -> None:  # type: ignore[no-untyped-def]
            loss.backward()
            norms.append(torch.stack([p.grad.norm() for p in trained]))

        step, weights = trajectory_step(method, hyper, backward), bound(tolerance, "weights")
        total = hyper["epochs"] * hyper["iters_per_epoch"]
        slopes = Bound(1e-7, 1e-9) if dtype == torch.float64 else Bound(1e-3, 1e-4)
        for i in range(total):
            scalars = step(
                trajectory_crops(tensors, i % len(tensors["in.global_u8"]), dtype),
                Progress(i, total, hyper["iters_per_epoch"]),
            )
            yield compare(
                f"{label}.loss{i}",
                scalars["loss"],
                own[f"out{suffix}.loss"][i],
                bound(tolerance, "loss"),
            )
            center = own[f"out{suffix}.center"][i]
            yield compare(
                f"{label}.center{i}", method.centering.center, center, bound(tolerance, "centre")
            )
            yield compare(
                f"{label}.norms{i}", norms[i], own[f"out{suffix}.grad_norms_before_clip"][i], slopes
            )
            yield from trajectory_weights(
                f"{label}.student{i + 1}",
                method.student,
                below(own, f"out64r.student_after{i + 1}."),
                weights,
                dtype,
            )
        yield from trajectory_weights(
            f"{label}.student", method.student, below(own, "out64r.student_final."), weights, dtype
        )
        teacher = method.teachers["ema"].module
        yield from trajectory_weights(
            f"{label}.teacher", teacher, below(own, "out64r.teacher_final."), weights, dtype
        )


def trajectory_method(hyper: Case, weights: Tensors, dtype: torch.dtype) -> DINO:
    """DINO of compat=dino with a case's numbers, student and teacher at the case's weights."""
    config = compat_config()["method"]
    method = DINO(
        build_vit(hyper["vit"]),
        lambda width: build_head(hyper["head"], in_dim=width),
        momentum=instantiate(config["momentum"] | {"base": hyper.get("momentum_teacher", 0.99)}),
        teacher_temp=instantiate(
            config["teacher_temp"]
            | {
                "start": hyper.get("warmup_teacher_temp", 0.04),
                "end": hyper.get("teacher_temp", 0.04),
                "warmup": f"{hyper.get('warmup_teacher_temp_epochs', 0)} epochs",
            }
        ),
        center_momentum=hyper.get("center_momentum", 0.9),
    )
    method.student.load_state_dict(weights)
    method.teachers["ema"].module.load_state_dict(weights)
    return method.to(dtype)


def trajectory_step(method: DINO, hyper: Case, backward: Any) -> Step:
    """The step of compat=dino with a case's numbers."""
    config = compat_config()
    optim = config["optim"]
    optimizer = instantiate(
        put(optim["optimizer"], "betas", hyper["adamw"]["betas"]), eps=hyper["adamw"]["eps"]
    )
    groups = param_groups(method.student, decay_tokens=optim["decay_tokens"])
    rate = {
        "base": hyper["lr"],
        "end": hyper.get("min_lr", hyper["lr"]),
        "warmup": f"{hyper.get('warmup_epochs', 0)} epochs",
    }
    decay = {"base": hyper["weight_decay"], "end": hyper["weight_decay_end"]}
    return Step(
        method,
        instantiate(put(config["loss"], "dino.student_temp", hyper.get("student_temp", 0.1))),
        optimizer(groups),
        learning_rate=instantiate(optim["learning_rate"] | rate),
        weight_decay=instantiate(optim["weight_decay"] | decay),
        clip=hyper["clip"],
        clip_by=optim["clip_by"],
        freeze_last_layer=f"{hyper['freeze_last_layer']} epochs",
        backward=backward,
    )


def trajectory_crops(tensors: Tensors, batch: int, dtype: torch.dtype) -> Crops:
    """A stored batch as the step takes it: pixels (u8 - 127.5) / 64."""
    globals_, locals_ = (
        (tensors[f"in.{kind}_u8"][batch].to(dtype) - 127.5) / 64 for kind in ("global", "local")
    )
    return crops_of(globals_, locals_)


def crops_of(globals_: Tensor, locals_: Tensor | None) -> Crops:
    """Crops without a history: where they were cut does not matter here."""
    num = len(globals_) + (0 if locals_ is None else len(locals_))
    size = globals_.shape[1]
    return Crops(
        globals_,
        locals_,
        torch.arange(size),
        None,
        torch.zeros(num, size, 4),
        torch.zeros(num, size, 1),
    )


def dummy_crops(hyper: Case, dtype: torch.dtype) -> Crops:
    """Something to step on where gradients are planted."""
    size, channels = hyper["vit"]["img_size"], hyper["vit"]["in_chans"]
    return crops_of(torch.zeros(2, 1, channels, size, size, dtype=dtype), None)


def trajectory_weights(
    label: str, network: nn.Module, wanted: Tensors, limit: Bound, dtype: torch.dtype
) -> Iterator[Check]:
    """Every stored parameter; in float32 without the key bias, whose true gradient is zero."""
    for name, value in wanted.items():
        found = network.get_parameter(name)
        if name.endswith("qkv.bias") and dtype == torch.float32:
            dim = len(value) // 3
            keep = torch.cat([torch.arange(dim), torch.arange(2 * dim, 3 * dim)])
            found, value = found[keep], value[keep]
        yield compare(f"{label}.{name}", found, value, limit)
