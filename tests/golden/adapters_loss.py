"""Golden case A02: centering and cross-entropy over consecutive calls, in one process and in
several.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import torch

from dino_lite.contracts import Prototypes, Scores, Targets
from dino_lite.losses.prototype import cross_view_pairs, prototype_cross_entropy
from dino_lite.nn.centering import EMACentering
from golden.adapters_core import compat_config, temperature
from golden.check import Case, Check, Tensors, below, bound, compare
from ranks import on_ranks


def a02(case: Case, tensors: Tensors, folder: Path) -> Iterator[Check]:
    """Losses, gradients and centers of every variant; those of several ranks run in as many
    processes.
    """
    config = compat_config()
    temps = [temperature(config, case["hyper"], epoch) for epoch in range(case["hyper"]["nepochs"])]
    joint: dict[int, dict[int, str]] = defaultdict(dict)
    for name, hyper in case["hyper"]["variants"].items():
        own, limit = below(tensors, f"{name}/"), bound(case["tolerance"]["f64"])
        schedule = torch.tensor(temps, dtype=torch.float64)
        yield compare(f"{name}.temperature", schedule, own["out.teacher_temp_schedule"], limit)
        if hyper["world_size"] > 1:
            joint[hyper["world_size"]][hyper["rank"]] = name
        else:
            yield from held_against(case, name, own, run_calls(case, hyper, own, temps))
    for world_size, names in joint.items():
        parts = [below(tensors, f"{names[rank]}/") for rank in range(world_size)]
        hypers = [case["hyper"]["variants"][names[rank]] for rank in range(world_size)]
        calls = on_ranks(world_size, _calls_of_rank, case, hypers, parts, temps)
        for rank, found in enumerate(calls):
            yield from held_against(case, names[rank], parts[rank], found)


def run_calls(case: Case, hyper: Case, own: Tensors, temps: list[float]) -> Tensors:
    """Loss, gradient and center after each call, in float64 and float32. Prototypes are the unit
    vectors: z is logits.
    """
    found: Tensors = {}
    for dtype, suffix in ((torch.float64, "64"), (torch.float32, "")):
        unit = Prototypes(torch.eye(case["hyper"]["out_dim"], dtype=dtype))
        centering = EMACentering(case["hyper"]["out_dim"], case["hyper"]["center_momentum"]).to(
            dtype
        )
        num_global = case["hyper"]["n_global"]
        for i, epoch in enumerate(case["hyper"]["epoch_of_call"]):
            student = own[f"in.student.{i}"].to(dtype).requires_grad_()
            teacher = own[f"in.teacher.{i}"].to(dtype).unflatten(0, (num_global, hyper["batch"]))
            row, col = centering(teacher, unit, temps[epoch])
            targets = Targets(
                z=teacher,
                prototypes=unit,
                row=row,
                col=col,
                temp=temps[epoch],
                pairs=cross_view_pairs(num_global, hyper["ncrops"]),
                weight=torch.full((hyper["batch"],), 1 / hyper["batch"], dtype=dtype),
            )
            scores = Scores(student.unflatten(0, (hyper["ncrops"], hyper["batch"])), unit)
            loss = prototype_cross_entropy(scores, targets, case["hyper"]["student_temp"])
            loss.backward()
            centering.after_step(torch.tensor(True))
            assert student.grad is not None
            found |= {
                f"out{suffix}.loss.{i}": loss.detach(),
                f"grad{suffix}.student.{i}": student.grad,
            }
            found[f"out{suffix}.center.{i}"] = centering.center.clone()[None]
    return found


def held_against(case: Case, name: str, own: Tensors, found: Tensors) -> Iterator[Check]:
    """Every stored output of a variant beside ours."""
    for key, value in found.items():
        text = case["tolerance"]["f64" if "64." in key else "f32"]
        subject = (
            "gradient" if key.startswith("grad") else "centre" if ".center." in key else "loss"
        )
        limit = bound(text, subject)
        if "64." in key:  # a relative bound alone says nothing at elements that are nearly zero
            limit = limit._replace(scale=limit.rtol)
        yield compare(f"{name}.{key}", value, own[key], limit)


def _calls_of_rank(
    rank: int, case: Case, hypers: list[Case], parts: list[Tensors], temps: list[float]
) -> Tensors:
    return run_calls(case, hypers[rank], parts[rank], temps)
