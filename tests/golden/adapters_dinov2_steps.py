"""Golden case B18: six steps of the whole DINOv2 objective, by public code under compat=dinov2."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dino_lite.backbones.vit import ViT
from dino_lite.config import Config, compose, instantiate, put
from dino_lite.contracts import Progress
from dino_lite.methods.dinov2 import DINOv2
from dino_lite.methods.step import Step
from dino_lite.nn.centering import EMACentering, SinkhornKnopp
from dino_lite.nn.heads import DINOHead
from dino_lite.nn.masking import BlockMasking
from dino_lite.optim.param_groups import param_groups
from golden.adapters_core import below, crops_of, trajectory_weights
from golden.check import Bound, Check, bound, compare

Case = dict[str, Any]
Tensors = dict[str, Tensor]
_PRECISIONS = ((torch.float64, "f64", "64"), (torch.float32, "f32", ""))
_HEADS = {"dino_head.": "head.", "ibot_head.": "patch_head."}
_STORED_ROUNDED = 6e-8  # float64 results stored in float32
_CENTER_F32 = 1e-6  # B11's bound for a center in float32: some entries are near zero


class StoredMasks(BlockMasking):
    """In the place of masks that are drawn: those of the case, step by step."""

    def __init__(self, masks: Tensor, side: int) -> None:
        super().__init__()
        self.masks, self.side = masks.numpy(), side

    def draw(self, num_crops: int, grid: tuple[int, int], step: int) -> np.ndarray:
        """The masks of a step, crop-major."""
        assert (num_crops, self.side, self.side) == (self.masks.shape[1], *grid)
        return self.masks[step].reshape(num_crops, *grid)


@functools.cache
def config() -> Config:
    """The configuration of a pretraining run under compat=dinov2."""
    return compose("pretrain", ["method=dinov2", "compat=dinov2"])


def b18(case: Case, tensors: Tensors, folder: Path) -> Iterator[Check]:
    """Losses, centers, gradient norms, clipped gradients, student and teacher weights."""
    hyper = case["hyper"]
    for (variant, switches), (dtype, precision, suffix) in itertools.product(
        hyper["variants"].items(), _PRECISIONS
    ):
        own, label = below(tensors, f"{variant}/"), f"{variant}.{precision}"
        tolerance = case["tolerance"][precision]
        limit, weights = bound(tolerance, "losses"), bound(tolerance, "weights")
        centers = limit._replace(atol=_CENTER_F32) if dtype == torch.float32 else limit
        method = make_method(hyper | switches, renamed(below(own, "w.init.")), tensors, dtype)
        norms: list[Tensor] = []
        step = make_step(method, hyper, norms)
        for i in range(hyper["steps"]):
            at = Progress(i, hyper["steps"], hyper["epoch_length"])
            large, small = (
                (tensors[f"in.{kind}_u8"][i].to(dtype) - 127.5) / 64 for kind in ("global", "local")
            )
            scalars = step(crops_of(large, small), at)
            total = own[f"out{suffix}.total_loss"][i]
            yield compare(f"{label}.loss{i}", scalars["loss"], total, limit)
            terms = own[f"out{suffix}.loss_terms"][i]  # local, global, half of KoLeo, half of iBOT
            found = (
                scalars["dino"],
                hyper["koleo_loss_weight"] * scalars["koleo"] / 2,
                scalars["ibot"] / 2,
            )
            for name, a, b in zip(
                ("dino", "koleo", "ibot"), found, (terms[0] + terms[1], *terms[2:]), strict=True
            ):
                yield compare(f"{label}.{name}{i}", a, b, limit)
            wanted = own[f"out{suffix}.grad_norms_before_clip"][i]
            yield compare(f"{label}.norms{i}", norms[i], wanted, limit)
            for name, centering in (("dino", method.centering), ("ibot", method.patch_centering)):
                center = own.get(f"out{suffix}.{name}_center")
                if center is not None:
                    assert isinstance(centering, EMACentering)
                    yield compare(f"{label}.{name}_center{i}", centering.center, center[i], centers)
            if i == 0 and dtype == torch.float64:
                for name, value in renamed(below(own, "grad64r.step0_after_clip.")).items():
                    rounded = Bound(limit.rtol + _STORED_ROUNDED, 1e-12)
                    slope = method.student.get_parameter(name).grad
                    assert slope is not None
                    yield compare(f"{label}.grad.{name}", slope, value, rounded)
            if i == 2:
                after = renamed(below(own, "out64r.student_after3."))
                yield from trajectory_weights(
                    f"{label}.student3", method.student, after, weights, dtype
                )
        for name, network in (("student", method.student), ("teacher", method.ema.module)):
            final = renamed(below(own, f"out64r.{name}_final."))
            yield Check(f"{label}.{name} is there", float(not final), 0.0)
            yield from trajectory_weights(f"{label}.{name}", network, final, weights, dtype)


def renamed(weights: Tensors) -> Tensors:
    """The reference's heads by our names."""
    found = {}
    for name, value in weights.items():
        for theirs, ours in _HEADS.items():
            name = name.replace(theirs, ours) if name.startswith(theirs) else name
        found[name] = value
    return found


def make_method(hyper: Case, weights: Tensors, tensors: Tensors, dtype: torch.dtype) -> DINOv2:
    """DINOv2 of compat=dinov2 with the case's numbers, student and teacher at its weights."""
    vit, of_heads, switches = hyper["vit"], hyper["head"], config()["backbone"]
    backbone = ViT(
        "vit",
        vit["img_size"],
        vit["patch_size"],
        position_offset=switches["position_offset"],
        position_antialias=switches["position_antialias"],
        num_registers=vit["registers"],
        mask_token=True,
        embed_dim=vit["embed_dim"],
        depth=vit["depth"],
        num_heads=vit["num_heads"],
        mlp_ratio=vit["mlp_ratio"],
        init_values=1.0,
        norm_eps=vit["layer_norm_eps"],
    )
    method_config = config()["method"]
    head, patch_head = (
        functools.partial(
            DINOHead,
            num_prototypes=of_heads[f"{kind}_out"],
            hidden_dim=of_heads["hidden_dim"],
            bottleneck_dim=of_heads["bottleneck_dim"],
            num_layers=of_heads["nlayers"],
            learn_norm=method_config["head"]["learn_norm"],
        )
        for kind in ("dino", "ibot")
    )
    temperature = {
        "start": hyper["warmup_teacher_temp"],
        "end": hyper["teacher_temp"],
        "warmup": f"{hyper['warmup_teacher_temp_epochs']} epochs",
    }
    centerings: dict[str, Any] = {
        "sinkhorn_knopp": functools.partial(
            SinkhornKnopp, num_iterations=hyper["sinkhorn_iterations"]
        ),
        "centering": functools.partial(EMACentering, momentum=hyper["center_momentum"]),
    }
    method = DINOv2(
        backbone,
        head,
        momentum=instantiate(method_config["momentum"] | {"base": hyper["momentum_teacher"]}),
        teacher_temp=instantiate(method_config["teacher_temp"] | temperature),
        centering=centerings[hyper["centering"]],
        masking=StoredMasks(tensors["in.masks"], vit["img_size"] // vit["patch_size"]),
        patch_head=patch_head if hyper["separate"] else None,
    )
    method.student.load_state_dict(weights)
    method.ema.module.load_state_dict(weights)
    return method.to(dtype)


def make_step(method: DINOv2, hyper: Case, norms: list[Tensor]) -> Step:
    """The step of compat=dinov2 with the case's numbers; notes the gradient norm of each module."""
    optim, loss = config()["optim"], config()["loss"]
    for name in ("dino", "ibot"):
        loss = put(loss, f"{name}.student_temp", hyper["student_temp"])
        loss = put(loss, f"{name}.weight.value", hyper[f"{name}_loss_weight"])
    loss = put(loss, "koleo.weight.value", hyper["koleo_loss_weight"])
    optimizer = instantiate(
        put(optim["optimizer"], "betas", hyper["adamw"]["betas"]), eps=hyper["adamw"]["eps"]
    )
    groups = param_groups(
        method.student,
        decay_tokens=optim["decay_tokens"],
        layer_decay=hyper["layerwise_decay"],
        patch_embed_scale=hyper["patch_embed_lr_mult"],
        freeze_by=optim["freeze_by"],
    )
    rate = {
        "base": hyper["lr"],
        "end": hyper["min_lr"],
        "warmup": f"{hyper['warmup_epochs']} epochs",
    }
    decay = {"base": hyper["weight_decay"], "end": hyper["weight_decay_end"]}

    def backward(total: Tensor) -> None:
        total.backward()
        norms.append(torch.stack([_norm(part) for part in method.student.children()]))

    return Step(
        method,
        instantiate(loss),
        optimizer(groups),
        learning_rate=instantiate(optim["learning_rate"] | rate),
        weight_decay=instantiate(optim["weight_decay"] | decay),
        clip=hyper["clip_grad"],
        clip_by=optim["clip_by"],
        freeze_last_layer=f"{hyper['freeze_last_layer_epochs']} epochs",
        backward=backward,
    )


def _norm(module: nn.Module) -> Tensor:
    slopes = [p.grad.flatten() for p in module.parameters() if p.grad is not None]
    return torch.cat(slopes).norm()
