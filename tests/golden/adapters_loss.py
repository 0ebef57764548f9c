"""Golden case A02: centering and cross-entropy over consecutive calls, in one process and in
several.
"""

from __future__ import annotations

import tempfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from dino_lite.contracts import Prototypes, Scores, Targets
from dino_lite.losses.prototype import cross_view_pairs, prototype_cross_entropy
from dino_lite.nn.centering import EMACentering
from golden.adapters_core import Case, Tensors, below, compat_config, temperature
from golden.check import Check, bound, compare


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
        hypers = {rank: case["hyper"]["variants"][name] for rank, name in names.items()}
        parts = {rank: below(tensors, f"{name}/") for rank, name in names.items()}
        with tempfile.TemporaryDirectory() as scratch:
            mp.spawn(
                _one_rank, (world_size, scratch, case, hypers, parts, temps), nprocs=world_size
            )
            for rank, name in names.items():
                found = torch.load(Path(scratch) / f"{rank}.pt", weights_only=True)
                yield from held_against(case, name, parts[rank], found)


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


def _one_rank(
    rank: int,
    world_size: int,
    scratch: str,
    case: Case,
    hypers: dict[int, Any],
    parts: dict[int, Tensors],
    temps: list[float],
) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{scratch}/group", rank=rank, world_size=world_size
    )
    found: dict[str, Tensor] = run_calls(case, hypers[rank], parts[rank], temps)
    torch.save(found, Path(scratch) / f"{rank}.pt")
    dist.destroy_process_group()
