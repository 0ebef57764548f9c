"""One number of a golden case: how far the project is from it, and how far it may be; and the words
in which adapters speak of a case.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import torch
from torch import Tensor

_NUMBER = r"\s*([0-9.]+(?:e-?[0-9]+)?)"

Case = dict[str, Any]
Tensors = dict[str, Tensor]


class Check(NamedTuple):
    """`error` and `tolerance` are in the same unit; the check holds where error <= tolerance (NaN
    never does).
    """

    name: str
    error: float
    tolerance: float


class Bound(NamedTuple):
    """|found - wanted| <= atol + rtol·|wanted| + scale·max|wanted|."""

    rtol: float = 0.0
    atol: float = 0.0
    scale: float = 0.0


def below(tensors: Tensors, prefix: str) -> Tensors:
    """Tensors whose name begins with `prefix`, by the rest of it."""
    return {
        name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)
    }


def bound(text: str, subject: str = "") -> Bound:
    """The numbers of a case's tolerance text for `subject`: of the clause that names it, or the
    first clause.
    """
    clauses = re.split(r";|(?<!e)\. ", text)
    clause = next((c for c in clauses if subject and subject in c), clauses[0])
    rtol = re.search("rtol" + _NUMBER, clause)
    atol = re.search(
        "atol" + _NUMBER + r"(?:\s*\*\s*max(?:\|\w+\|)?(?:\s*\*" + _NUMBER + ")?)?", clause
    )
    if rtol is None and atol is None:
        raise ValueError(f"no rtol or atol in the tolerance {clause!r}")
    relative = float(rtol[1]) if rtol else 0.0
    if atol is None:
        return Bound(relative)
    if "max" in atol[0]:
        return Bound(relative, 0.0, float(atol[1]) * float(atol[2] or 1))
    return Bound(relative, float(atol[1]))


def compare(name: str, found: Tensor | float, wanted: Tensor | float, limit: Bound) -> Check:
    """The element that comes nearest to its bound, or passes it farthest; a wrong shape never
    holds.
    """
    a, b = torch.as_tensor(found).detach().double(), torch.as_tensor(wanted).detach().double()
    if a.shape != b.shape:
        return Check(f"{name}: shape {tuple(a.shape)} for {tuple(b.shape)}", float("inf"), 0.0)
    if b.numel() == 0:
        return Check(name, 0.0, 0.0)
    error = (a - b).abs().flatten()
    allowed = limit.atol + limit.rtol * b.abs().flatten() + limit.scale * b.abs().max()
    if bool(error.isnan().any()):
        return Check(name, float("nan"), float(allowed.max()))
    worst = int((error / allowed.clamp(min=1e-300)).argmax())
    return Check(name, float(error[worst]), float(allowed[worst]))
