"""Golden cases B11 to B13: DINOv2's class-token and masked-patch losses under both centerings, and
KoLeo.

Prototypes are the unit vectors: z is logits. The reference folds a batch's mean into the center
when probabilities are next asked for, ours after the step; the numbers are the same.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dino_lite.contracts import Prototypes, Scores, Targets
from dino_lite.losses.koleo import koleo
from dino_lite.losses.prototype import prototype_cross_entropy
from dino_lite.nn.centering import EMACentering, SinkhornKnopp
from golden.check import Bound, Case, Check, Tensors, below, bound, compare
from ranks import on_ranks

_PRECISIONS = ((torch.float64, "64"), (torch.float32, ""))
_STORED_ROUNDED = 6e-8  # float64 in float32: half a unit in the last place
_YES = torch.tensor(True)


def b11(case: Case, tensors: Tensors, folder: Path) -> Iterator[Check]:
    """Probabilities, losses, gradients and centers of three calls; iterations; two processes."""
    hyper, iterations = case["hyper"], case["hyper"]["sinkhorn_iterations"]
    for name, sizes in hyper["variants"].items():
        own = below(tensors, f"{name}/")
        for dtype, suffix in _PRECISIONS:
            centering = _centering(name, hyper["out_dim"], dtype, hyper)
            found = _three_calls(own, centering, dtype, suffix, hyper | sizes)
            yield from _held(case, f"{name}/", own, found, suffix)
    own = below(tensors, "sk_iters/")
    for dtype, suffix in _PRECISIONS:
        found = {}
        for key in below(own, "out.iters"):
            sinkhorn = SinkhornKnopp(hyper["out_dim"], int(key))
            targets = _targets(own["in.teacher"][None].to(dtype), sinkhorn, hyper["sk_iters_temp"])
            found[f"out{suffix}.iters{key}"] = targets.probs()[0]
        yield from _held(case, "sk_iters/", own, found, suffix)
    parts = [below(tensors, f"world2_rank{rank}/") for rank in range(2)]
    for rank, found in enumerate(on_ranks(2, _of_rank, parts, hyper, iterations)):
        for _, suffix in _PRECISIONS:
            yield from _held(case, f"world2_rank{rank}/", parts[rank], found, suffix)


def _of_rank(rank: int, parts: list[Tensors], hyper: Case, iterations: int) -> Tensors:
    """One process's half of what two find."""
    own, temp, found = parts[rank], hyper["world2_temp"], {}
    for dtype, suffix in _PRECISIONS:
        ema = _centering("centering", hyper["out_dim"], dtype, hyper)
        sinkhorn = SinkhornKnopp(hyper["out_dim"], iterations)
        cls, patches = (own[f"in.teacher{x}"][None].to(dtype) for x in ("", "_patches"))
        _targets(cls, ema, temp)
        ema.after_step(_YES)
        found |= {
            f"out{suffix}.center": ema.center[None].clone(),
            f"out{suffix}.teacher_prob_softmax_call2": _targets(cls, ema, temp).probs()[0],
            f"out{suffix}.teacher_prob_sinkhorn": _targets(cls, sinkhorn, temp).probs()[0],
            f"out{suffix}.patch_prob_sinkhorn": _targets(patches, sinkhorn, temp).probs()[0],
        }
    return found


def _three_calls(
    own: Tensors, centering: Any, dtype: torch.dtype, suffix: str, hyper: Case
) -> Tensors:
    """Local crops against both teacher crops, all pairs summed; global crops row by row."""
    found, num_images = {}, hyper["batch"]
    pairs = {"local": torch.ones(2, hyper["n_local"]), "global": torch.eye(2) / 2}
    for i, temp in enumerate(hyper["teacher_temps"]):
        teacher = own[f"in.teacher.{i}"].to(dtype).unflatten(0, (2, num_images))
        if isinstance(centering, EMACentering):
            found[f"out{suffix}.center_used.{i}"] = centering.center[None].clone()
        targets = _targets(teacher, centering, temp)
        found[f"out{suffix}.teacher_prob.{i}"] = targets.probs().flatten(0, 1)
        for which, weights in pairs.items():
            student = own[f"in.student_{which}.{i}"].to(dtype).requires_grad_()
            z, part = student.unflatten(0, (-1, num_images)), targets._replace(pairs=weights)
            scores = Scores(z, targets.prototypes)
            loss = prototype_cross_entropy(scores, part, hyper["student_temp"])
            (found[f"grad64r.student_{which}.{i}"],) = torch.autograd.grad(loss, student)
            found[f"out{suffix}.loss_{which}.{i}"] = loss
        centering.after_step(_YES)
    if isinstance(centering, EMACentering):
        found[f"out{suffix}.center_final"] = centering.center[None]
    return found


def b12(case: Case, tensors: Tensors, folder: Path) -> Iterator[Check]:
    """Masked patches of all images as rows of one crop, weighed by image or as given."""
    hyper, mask = case["hyper"], tensors["in.mask"]
    for dtype, suffix in _PRECISIONS:
        all_patches = tensors["in.teacher_patches"].to(dtype)
        teacher, student = (
            tensors[f"in.{x}_patches"].to(dtype)[mask] for x in ("teacher", "student")
        )
        by_image = (1 / mask.sum(1).clamp(min=1).to(dtype)).repeat_interleave(mask.sum(1))
        given = tensors["out.default_masks_weight"].to(dtype)
        weights = {
            "default_weight": by_image,
            "given_weight": given,
            "padded": given,  # rows of padding are not among ours at all
            "custom_weight": tensors["in.custom_weights"].to(dtype),
        }
        for name in ("centering", "sinkhorn"):
            centering = _centering(name, hyper["patch_out_dim"], dtype, hyper)
            found = {}
            if isinstance(centering, EMACentering):
                centering.center.fill_(hyper["centering_initial_center"])
                found[f"out{suffix}.center_before"] = centering.center[None, None].clone()
            targets = _targets(teacher[None], centering, hyper["teacher_temp"])
            found[f"out{suffix}.teacher_prob"] = targets.probs()[0]
            for key, weight in weights.items():
                z = student[None].clone().requires_grad_()
                part = targets._replace(weight=weight / hyper["n_images"])
                scores = Scores(z, targets.prototypes)
                loss = prototype_cross_entropy(scores, part, hyper["student_temp"])
                (slope,) = torch.autograd.grad(loss, z)
                found[f"out{suffix}.forward_masked.{key}"] = loss
                found[f"grad64r.student_masked_rows.{key}"] = slope[0]
            centering.after_step(_YES)
            if isinstance(centering, EMACentering):
                found[f"out{suffix}.center_after"] = centering.center[None, None]
            yield from _held(case, f"{name}/", below(tensors, f"{name}/"), found, suffix)
        # The dense form: the center is the mean over all patches, the loss that over masked ones.
        centering = _centering("centering", hyper["patch_out_dim"], dtype, hyper)
        targets = _targets(teacher[None], centering, hyper["teacher_temp"])
        part = targets._replace(weight=by_image / hyper["n_images"])
        scores = Scores(student[None], targets.prototypes)
        loss = prototype_cross_entropy(scores, part, hyper["student_temp"])
        _targets(all_patches, centering, hyper["teacher_temp"])
        centering.after_step(_YES)
        center = centering.center[None, None]
        found = {f"out{suffix}.forward": loss, f"out{suffix}.center_after_batch_of_5": center}
        yield from _held(case, "dense/", below(tensors, "dense/"), found, suffix)


def b13(case: Case, tensors: Tensors, folder: Path) -> Iterator[Check]:
    """Value and gradient of every variant; duplicates have tolerances of their own."""
    for name in sorted({key.partition("/")[0] for key in tensors}):
        own = below(tensors, f"{name}/")
        for dtype, suffix in _PRECISIONS:
            x = own["in.x"].to(dtype).requires_grad_()
            loss = koleo(x, torch.full((len(x),), 1 / len(x), dtype=dtype))
            (slope,) = torch.autograd.grad(loss, x)
            text = case["tolerance"]["f64" if suffix else "f32"]
            own_limit = re.search(rf"{name} ([0-9.e-]+)", text)
            relative = float(own_limit[1]) if own_limit else bound(text).rtol
            limit = Bound(relative, scale=relative)
            yield compare(f"{name}/{suffix}.loss", loss, own[f"out{suffix}.loss"], limit)
            if f"grad{suffix}.x" in own:
                yield compare(f"{name}/{suffix}.grad", slope, own[f"grad{suffix}.x"], limit)


def _centering(name: str, num_prototypes: int, dtype: torch.dtype, hyper: Case) -> Any:
    if name == "sinkhorn":
        return SinkhornKnopp(num_prototypes, hyper.get("sinkhorn_iterations", 3))
    return EMACentering(num_prototypes, hyper["center_momentum"]).to(dtype)


def _targets(teacher: Tensor, centering: Any, temp: float) -> Targets:
    """Distributions of the logits T n K; pairs of one crop, images of equal weight."""
    num_crops, num_images, num_prototypes = teacher.shape
    eye = Prototypes(torch.eye(num_prototypes, dtype=teacher.dtype))
    row, col = centering(teacher, eye, temp)
    pairs, weight = torch.ones(num_crops, 1), teacher.new_full((num_images,), 1 / num_images)
    return Targets(teacher, eye, row, col, temp, pairs, weight)


def _held(case: Case, name: str, own: Tensors, found: Tensors, suffix: str) -> Iterator[Check]:
    """Every stored output of a precision beside ours; both are held to the gradients of float64."""
    for key, wanted in own.items():
        if not key.startswith((f"out{suffix}.", "grad64r.")):
            continue
        probs = "prob" in key or "iters" in key
        subject = "probabilities" if probs else "centre" if "center" in key else "loss"
        limit = bound(case["tolerance"]["f64" if suffix else "f32"], subject)
        if limit.atol == 0:  # a relative bound alone says nothing at elements that are nearly zero
            limit = limit._replace(scale=limit.rtol)
        if "64r." in key:
            limit = limit._replace(rtol=limit.rtol + _STORED_ROUNDED)
        yield compare(f"{name}{key}", found[key], wanted, limit)
