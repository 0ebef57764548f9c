"""Cross-entropy between distributions over prototypes: DINO's and iBOT's loss, as a memory-saving
kernel.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from dino_lite.contracts import (
    LOGITS_BYTES,
    Loss,
    Match,
    MatchError,
    Prototypes,
    Schedule,
    Scores,
    Targets,
)
from dino_lite.settings.kinds import Count, Positive
from dino_lite.settings.validate import checked


def prototype_cross_entropy(
    scores: Scores, targets: Targets, temp: float, chunk: int = 0
) -> Float[Tensor, ""]:
    """Σ_n weight_n Σ_s [(Σ_t pairs_ts)·logsumexp_s − ⟨Σ_t pairs_ts·q_t, s⟩], s = z·Pᵀ/temp (DINO,
    eq. 1 to 3).

    Equals the sum over all pairs (t, s) of pairs_ts·H(q_t, softmax(s)), because every q_t sums to
    one: one logsumexp per student crop instead of one log-softmax per pair. Logits exist for
    `chunk` images at a time (0: as many as fit 64 MiB, on a GPU 512 MiB), from which value and
    gradient are computed. Computed in at least float32. Differentiable by z and the student's
    prototypes.
    """
    prototypes = scores.prototypes
    value: Tensor = _CrossEntropy.apply(
        scores.z, prototypes.direction, prototypes.length, targets, temp, chunk
    )
    return value


class _CrossEntropy(torch.autograd.Function):
    """Computes the gradient together with the value, from one chunk of logits at a time, so that
    tensors of the inputs' sizes are saved instead of "S n K".

    With p = softmax(s) and a_s = Σ_t pairs_ts: ∂/∂z_s = weight·(a_s·p_s − Σ_t pairs_ts·q_t)·P/temp,
    and ⟨q_t, s⟩ = z_s·(q_t·P)/temp. So q_t·P "T n E" is used in value and gradient, and teacher and
    student are paired in E dimensions instead of K.
    """

    @staticmethod
    def forward(
        ctx: Any,
        z: Float[Tensor, "S n E"],
        direction: Float[Tensor, "K E"],
        length: Float[Tensor, "K 1"] | None,
        targets: Targets,
        temp: float,
        chunk: int,
    ) -> Float[Tensor, ""]:
        wide = torch.promote_types(z.dtype, torch.float32)
        v = direction.to(wide)
        ours = Prototypes(v, None if length is None else length.to(wide))
        theirs = targets.prototypes
        scales = ours.scale(), theirs.scale()
        total = torch.zeros((), dtype=wide, device=z.device)
        slope_z, slope_v = torch.empty_like(z, dtype=wide), None
        # Logits are divided by temperatures such as 0.04: bfloat16 is too coarse.
        with torch.autocast(z.device.type, enabled=False):
            for start, stop in _chunks(z, targets, chunk):
                part = targets.part(start, stop)
                z_part = z[:, start:stop].to(wide)
                value, given, rows, weights = _part(z_part, v, scales, part, temp)
                total += value
                slope_z[:, start:stop] = given
                if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
                    slope_v = weights @ rows if slope_v is None else slope_v.addmm_(weights, rows)
                del weights  # frees memory before the next chunk
        if slope_v is None and (ctx.needs_input_grad[1] or ctx.needs_input_grad[2]):
            slope_v = torch.zeros_like(v)  # no rows, but DDP waits for every parameter's gradient
        slope_g = None
        if slope_v is not None and ours.length is not None:
            slope_g = _through_norm_(slope_v, ours.direction, ours.length)
        wanted = zip(ctx.needs_input_grad, (slope_z, slope_v, slope_g), strict=False)
        ctx.save_for_backward(*(slope if needed else None for needed, slope in wanted))
        ctx.dtypes = z.dtype, direction.dtype, None if length is None else length.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Float[Tensor, ""]) -> tuple[Tensor | None, ...]:
        # On the CPU, skip the multiplication by the usual gradient of 1, a pass over the
        # prototypes; on other devices the comparison would synchronize.
        plain = slope.device.type == "cpu" and float(slope) == 1.0
        saved = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        slopes = [None if s is None else (s if plain else s * slope).to(dt) for s, dt in saved]
        return (*slopes, None, None, None)


def _part(
    z: Float[Tensor, "S n E"],
    v: Float[Tensor, "K E"],
    scales: tuple[Float[Tensor, "K 1"] | None, Float[Tensor, "K 1"] | None],
    targets: Targets,
    temp: float,
) -> tuple[Float[Tensor, ""], Float[Tensor, "S n E"], Float[Tensor, "_ E"], Float[Tensor, "K _"]]:
    """Value and gradient of z for some images, and the two factors whose product is scale·∂/∂P.

    Logits are stored prototype-major, "K (S+T)*n", for which all three matrix products are fastest.
    """
    num_student, num_images, width = z.shape
    pairs, weight = targets.pairs.to(z), targets.weight.to(z)
    pull = pairs.sum(0)  # S: a_s, the weight of each student crop's logsumexp
    columns = num_student * num_images
    logits = z.new_empty(len(v), columns + len(targets.z) * num_images)
    p, q = logits[:, :columns], logits[:, columns:]
    torch.mm(v, (z / temp).flatten(0, 1).T, out=p)
    theirs = targets.prototypes.direction.to(z)
    torch.mm(theirs, (targets.z.to(z) / targets.temp).flatten(0, 1).T, out=q)
    for part, scale in ((p, scales[0]), (q, scales[1])):
        if scale is not None:
            part.mul_(scale)
    q.add_(targets.row.to(z).flatten()).add_(targets.col.to(z)[:, None]).exp_()
    peak = p.amax(0)
    mass = p.sub_(peak).exp_().sum(0)
    lse = (peak + mass.log()).view(num_student, num_images)
    if scales[0] is not None:
        logits.mul_(scales[0])
    drawn = (logits.T @ v).view(-1, num_images, width)  # p·P, to be divided by mass, and q·P
    drawn, taught = drawn[:num_student], torch.einsum("ts,tne->sne", pairs, drawn[num_student:])
    value = (weight * (pull[:, None] * lse - (z * taught).sum(-1) / temp)).sum()
    sharp = (weight / temp)[:, None]  # n 1
    share = pull[:, None, None] * sharp / mass.view(num_student, num_images, 1)  # S n 1
    given = torch.einsum("ts,sne->tne", pairs, z * sharp)
    rows = torch.cat([z * share, -given]).flatten(0, 1)
    return value, drawn * share - taught * sharp, rows, logits


def _through_norm_(
    slope: Float[Tensor, "K E"], direction: Float[Tensor, "K E"], length: Float[Tensor, "K 1"]
) -> Float[Tensor, "K 1"]:
    """Backward of weight normalization, P = length·direction/‖direction‖: converts scale·∂/∂P to
    ∂/∂direction in place and returns ∂/∂length (Salimans and Kingma 2016, eq. 3).
    """
    lengths = []
    step = len(slope) if slope.device.type != "cpu" else 4096  # rows that fit the CPU's cache
    for i in range(0, len(slope), step):
        part, v = slope[i : i + step], direction[i : i + step]
        along = (part * v).sum(1, keepdim=True)
        squares = v.square().sum(1, keepdim=True)
        lengths.append(along / length[i : i + step])
        part.addcmul_(v, along / squares, value=-1)
    return torch.cat(lengths)


def _chunks(z: Tensor, targets: Targets, chunk: int) -> list[tuple[int, int]]:
    """First and end index of the images of each chunk."""
    num_images = z.shape[1]
    if not chunk:
        columns, num_prototypes = len(z) + len(targets.z), len(targets.prototypes.direction)
        row = columns * num_prototypes * max(z.element_size(), 4)
        chunk = max(1, LOGITS_BYTES.get(z.device.type, LOGITS_BYTES["cuda"]) // row)
    return [(i, min(i + chunk, num_images)) for i in range(0, num_images, chunk)]


def cross_view_pairs(num_teacher: int, num_student: int) -> Float[Tensor, "T S"]:
    """Weights of the mean over all pairs of a teacher crop and a different student crop, in float64
    (DINO, Algorithm 1).
    """
    pairs = torch.ones(num_teacher, num_student, dtype=torch.float64)
    pairs.fill_diagonal_(0.0)
    return pairs / pairs.sum()


class PrototypeLoss(Loss):
    """Adapter: cross-entropy of the Match named `reads`, student sharpened by `student_temp`."""

    @checked
    def __init__(
        self, reads: str, weight: Schedule, student_temp: Positive = 0.1, chunk: Count = 0
    ) -> None:
        self.reads, self.weight, self.student_temp, self.chunk = reads, weight, student_temp, chunk

    def __call__(self, match: Match) -> Float[Tensor, ""]:
        if not isinstance(match.student, Scores) or not isinstance(match.target, Targets):
            raise MatchError(f"{self.reads}: a prototype loss compares Scores with Targets")
        return prototype_cross_entropy(match.student, match.target, self.student_temp, self.chunk)
