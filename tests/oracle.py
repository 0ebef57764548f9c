"""DINO's arithmetic as plain loops: the definition that the fast code is held against.

Written from Caron et al. 2021 (arXiv 2104.14294), Algorithm 1, equations 1 to 4, section 3.2, and
from the papers that functions name; slow on purpose.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

# ------------------------------------------------------------------------------------ objective


def cross_entropy(q: Tensor, logits: Tensor) -> Tensor:
    """H(q, softmax(logits)) of one image (equation 2)."""
    return -(q * torch.log_softmax(logits, dim=-1)).sum()


def pair_loss(student: Tensor, q: Tensor, temp: float, pairs: Tensor, weight: Tensor) -> Tensor:
    """The weighted sum over every teacher crop, student crop and image: student S n K, q T n K."""
    total = student.new_zeros(())
    for t in range(len(q)):
        for s in range(len(student)):
            for image in range(len(weight)):
                h = cross_entropy(q[t, image], student[s, image] / temp)
                total = total + pairs[t, s] * weight[image] * h
    return total


def dino_loss(
    student: Tensor, teacher: Tensor, center: Tensor, student_temp: float, teacher_temp: float
) -> Tensor:
    """Equation 3 on logits S B K and T B K: the mean over pairs of different crops and images."""
    num_images = student.shape[1]
    total, terms = student.new_zeros(()), 0
    for t in range(len(teacher)):
        for s in range(len(student)):
            if s == t:
                continue
            terms += 1
            for image in range(num_images):
                q = torch.softmax((teacher[t, image] - center) / teacher_temp, dim=-1).detach()
                total = total + cross_entropy(q, student[s, image] / student_temp) / num_images
    return total / terms


def center_ema(center: Tensor, teacher: Tensor, momentum: float) -> Tensor:
    """Equation 4 on the teacher's logits T B K."""
    rows = [teacher[t, image] for t in range(teacher.shape[0]) for image in range(teacher.shape[1])]
    return momentum * center + (1 - momentum) * sum(rows) / len(rows)


def sinkhorn(logits: Tensor, temp: float, num_iterations: int) -> Tensor:
    """SwAV's Sinkhorn-Knopp as DINOv2 has it: rows n K, distributions over K prototypes."""
    num_rows, num_prototypes = logits.shape
    q = (logits / temp).exp()
    q = q / q.sum()
    for _ in range(num_iterations):
        for k in range(num_prototypes):
            q[:, k] = q[:, k] / q[:, k].sum() / num_prototypes
        for i in range(num_rows):
            q[i] = q[i] / q[i].sum() / num_rows
    return q * num_rows


def koleo(features: Tensor, weight: Tensor, eps: float = 1e-8) -> Tensor:
    """DINOv2's section 4: −log of the distance to the nearest other row, weighed, rows n D."""
    x = [row / row.norm() for row in features]
    total = features.new_zeros(())
    for i in range(len(x)):
        others = [j for j in range(len(x)) if j != i] or [i]
        nearest = max(others, key=lambda j: float(x[i].detach() @ x[j].detach()))
        distance = ((x[i] - x[nearest] + eps) ** 2).sum().sqrt()
        total = total - weight[i] * (distance + eps).log()
    return total


def gram(student: Tensor, anchor: Tensor) -> Tensor:
    """DINOv3's section 4.2 on one image, patches P D and P D': the mean over pairs of patches."""
    num_patches = len(student)
    total = student.new_zeros(())
    for i in range(num_patches):
        for j in range(num_patches):
            ours, theirs = (x[i] @ x[j] / (x[i].norm() * x[j].norm()) for x in (student, anchor))
            total = total + (ours - theirs) ** 2
    return total / num_patches**2


def born_again(
    logits: Tensor, teacher: Tensor, wanted: Tensor, objective: str, temperature: float
) -> Tensor:
    """Furlanello et al. 2018, section 3, but for permutations; rows n C, `wanted` distributions."""
    num, total = len(logits), logits.new_zeros(())
    confidence = [float(torch.softmax(teacher[i], 0).max()) for i in range(num)]
    for i in range(num):
        of_labels = cross_entropy(wanted[i], logits[i])
        p = torch.softmax(teacher[i] / temperature, 0)
        of_teacher = temperature**2 * cross_entropy(p, logits[i] / temperature)
        if objective == "cwtm":
            total = total + confidence[i] / sum(confidence) * of_labels
        else:
            total = total + of_teacher / num
            total = total + (of_labels / num if objective == "labels+logits" else 0)
    return total


# ------------------------------------------------------------------------------------ schedules


def cosine_schedule(
    base: float, final: float, total: int, warmup: int = 0, start: float = 0.0
) -> list[float]:
    """The reference's array: linspace(start, base, warmup), then a cosine short of final."""
    warm = torch.linspace(start, base, warmup, dtype=torch.float64).tolist()
    rest = total - warmup
    cosine = [final + (base - final) / 2 * (1 + math.cos(math.pi * i / rest)) for i in range(rest)]
    return warm + cosine


def temperature_schedule(start: float, final: float, warmup: int, total: int) -> list[float]:
    """linspace(start, final, warmup), then final."""
    warm = torch.linspace(start, final, warmup, dtype=torch.float64).tolist()
    return warm + [final] * (total - warmup)


# ------------------------------------------------------------------------------------ the update


def ema(average: Tensor, value: Tensor, momentum: float) -> Tensor:
    """The teacher's rule (section 3.1)."""
    return momentum * average + (1 - momentum) * value


def clip_global(gradients: Sequence[Tensor], limit: float) -> list[Tensor]:
    """All gradients by one factor, so that their joint L2 norm is at most `limit`."""
    norm = math.sqrt(sum(float((g * g).sum()) for g in gradients))
    return [g * min(1.0, limit / (norm + 1e-6)) for g in gradients]


def clip_each(gradients: Sequence[Tensor], limit: float) -> list[Tensor]:
    """Each gradient by its own factor, as DINO's code does."""
    return [clip_global([g], limit)[0] for g in gradients]


def adamw(
    weight: Tensor, gradient: Tensor, state: dict[str, Tensor], rate: float, decay: float
) -> Tensor:
    """One AdamW step (Loshchilov & Hutter 2019, Algorithm 2), betas .9 and .999; moves `state`."""
    beta1, beta2, eps = 0.9, 0.999, 1e-8
    step = state["step"] = state.get("step", torch.zeros(())) + 1
    m = state["m"] = beta1 * state.get("m", torch.zeros_like(weight)) + (1 - beta1) * gradient
    v = state["v"] = beta2 * state.get("v", torch.zeros_like(weight)) + (1 - beta2) * gradient**2
    m_hat, v_hat = m / (1 - beta1 ** int(step)), v / (1 - beta2 ** int(step))
    return weight - rate * decay * weight - rate * m_hat / (v_hat.sqrt() + eps)


# ------------------------------------------------------------------------------------ Algorithm 1


def logits(network: nn.Module, images: Tensor) -> Tensor:
    """One crop of every image through backbone, head and prototypes: n K."""
    head = network.head
    directions = head.last_layer.weight_v / head.last_layer.weight_v.norm(dim=1, keepdim=True)
    z = head.mlp(network.backbone(images).cls)
    return (z / z.norm(dim=1, keepdim=True)) @ (head.last_layer.weight_g * directions).T


def dino_step(
    student: nn.Module,
    teacher: nn.Module,
    center: Tensor,
    states: dict[str, dict[str, Tensor]],
    crops: Sequence[Tensor],
    num_global: int,
    *,
    rate: float,
    decay: float,
    decayed: set[str],
    clip: float,
    frozen: bool,
    momentum: float,
    student_temp: float,
    teacher_temp: float,
    center_momentum: float,
) -> tuple[Tensor, Tensor]:
    """One turn of Algorithm 1's loop on crops B C H W, in place; returns loss and new center."""
    with torch.no_grad():
        t = torch.stack([logits(teacher, crop) for crop in crops[:num_global]])
    s = torch.stack([logits(student, crop) for crop in crops])
    loss = dino_loss(s, t, center, student_temp, teacher_temp)
    named = {name: p for name, p in student.named_parameters() if p.requires_grad}
    gradients = clip_each(torch.autograd.grad(loss, list(named.values())), clip)
    with torch.no_grad():
        for (name, p), gradient in zip(named.items(), gradients, strict=True):
            if frozen and "last_layer" in name:
                continue
            state = states.setdefault(name, {})
            p.copy_(adamw(p, gradient, state, rate, decay if name in decayed else 0.0))
        for average, value in zip(teacher.parameters(), student.parameters(), strict=True):
            average.copy_(ema(average, value, momentum))
    return loss.detach(), center_ema(center, t, center_momentum)


# ------------------------------------------------------------------------------------ adaptation


def interpolate(start: Tensor, end: Tensor, alpha: float) -> Tensor:
    """(1 − α)·start + α·end, number by number in double precision (Wortsman et al. 2022)."""
    pairs = zip(start.flatten().tolist(), end.flatten().tolist(), strict=True)
    mixed = [(1 - alpha) * one + alpha * other for one, other in pairs]
    return torch.tensor(mixed, dtype=torch.float64).to(end.dtype).reshape(end.shape)


def channel_statistics(batches: Sequence[Tensor]) -> tuple[list[float], list[float]]:
    """Mean and unbiased variance of each channel over all images and places: batches n C h w."""
    mean, variance = [], []
    for channel in range(batches[0].shape[1]):
        values = [v for batch in batches for v in batch[:, channel].flatten().tolist()]
        mean.append(sum(values) / len(values))
        squares = sum((value - mean[-1]) ** 2 for value in values)
        variance.append(squares / (len(values) - 1))
    return mean, variance


def best_point(
    gains: Sequence[float], losses: Sequence[Sequence[float]], max_loss: float | None
) -> int:
    """The first point of largest gain where no loss (collection, point) is above `max_loss`."""
    best = 0
    for point in range(len(gains)):
        allowed = True
        for each in losses:
            if max_loss is not None and each[point] > max_loss:
                allowed = False
        if allowed and gains[point] > gains[best]:
            best = point
    return best


def shared_neighbors(one: Tensor, other: Tensor, bank: tuple[Tensor, Tensor], k: int) -> Tensor:
    """Percent of the k nearest rows of a bank, by cosine, that two networks share: queries n D."""
    found = []
    for i in range(len(one)):
        nearest = []
        for query, rows in ((one[i], bank[0]), (other[i], bank[1])):
            cosines = [float(query @ row / query.norm() / row.norm()) for row in rows]
            nearest.append(set(sorted(range(len(rows)), key=lambda j: -cosines[j])[:k]))
        found.append(100 * len(nearest[0] & nearest[1]) / k)
    return torch.tensor(found, dtype=torch.float64)


def paired_bootstrap(before: Tensor, after: Tensor, draws: Tensor) -> list[float]:
    """The mean gain of every sample of images, drawn before and after together: draws m n."""
    return [float(sum(after[i] - before[i] for i in draw.tolist()) / len(draw)) for draw in draws]


# ------------------------------------------------------------------------------------ positions


def bicubic(cells: Tensor, rows: int, columns: int, scale: tuple[float, float]) -> Tensor:
    """Resample a map H W by Keys' cubic (a = −3/4), each sample at (index + 1/2)/scale − 1/2."""

    def weigh(distance: float) -> float:
        d, a = abs(distance), -0.75
        if d <= 1:
            return (a + 2) * d**3 - (a + 3) * d**2 + 1
        return a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a if d < 2 else 0.0

    def line(values: Sequence[Tensor], at: float) -> Tensor:
        first = math.floor(at) - 1
        taps = range(first, first + 4)
        inside = [min(max(i, 0), len(values) - 1) for i in taps]
        return sum(weigh(at - i) * values[j] for i, j in zip(taps, inside, strict=True))

    tall = torch.stack([line(list(cells), (i + 0.5) / scale[0] - 0.5) for i in range(rows)])
    wide = [line(list(tall.T), (j + 0.5) / scale[1] - 0.5) for j in range(columns)]
    return torch.stack(wide, dim=1)


def shrink(cells: Tensor, rows: int, columns: int) -> Tensor:
    """Resample a map H W to a coarser one by Keys' cubic (a = −1/2) as wide as a coarse cell."""

    def weigh(distance: float) -> float:
        d = abs(distance)
        if d <= 1:
            return 1.5 * d**3 - 2.5 * d**2 + 1
        return -0.5 * d**3 + 2.5 * d**2 - 4 * d + 2 if d < 2 else 0.0

    def line(values: Sequence[Tensor], num: int) -> Tensor:
        scale = len(values) / num
        made = []
        for i in range(num):
            weights = [weigh((j + 0.5) / scale - (i + 0.5)) for j in range(len(values))]
            mixed = sum(w * v for w, v in zip(weights, values, strict=True))
            made.append(mixed / sum(weights))
        return torch.stack(made)

    return line(list(line(list(cells), rows).T), columns).T


# ------------------------------------------------------------------------------------ positions


def turned(
    x: Tensor,
    grid: tuple[int, int],
    base: float,
    shift: Sequence[float] = (0.0, 0.0),
    stretch: Sequence[float] = (1.0, 1.0),
) -> Tensor:
    """Queries or keys "P d" of patches in rows, turned by their places (DINOv3's RoPE): angles
    2π·coordinate/base^(2i/(d/2)), i < d/4, of rows then columns, each for the features j and j +
    d/2.
    """
    width, out = x.shape[1], torch.empty_like(x)
    for row in range(grid[0]):
        for column in range(grid[1]):
            patch = row * grid[1] + column
            angles = []
            for axis, place in enumerate((row, column)):
                coordinate = 2 * (place + 0.5) / grid[axis] - 1
                coordinate = (coordinate + shift[axis]) * stretch[axis]
                for i in range(width // 4):
                    angles.append(2 * math.pi * coordinate / base ** (2 * i / (width / 2)))
            for j, angle in enumerate(angles):
                low, high = x[patch, j], x[patch, j + width // 2]
                out[patch, j] = low * math.cos(angle) - high * math.sin(angle)
                out[patch, j + width // 2] = high * math.cos(angle) + low * math.sin(angle)
    return out


def kept(student: Tensor, frozen: Tensor) -> Tensor:
    """Squared error over the frozen token's squared norm, plus the cosine distance."""
    found, width = [], student.shape[-1]
    for s, t in zip(student.reshape(-1, width), frozen.reshape(-1, width), strict=True):
        dot = sum(a * b for a, b in zip(s, t, strict=True))
        norms = [sum(a * a for a in x) for x in (s, t)]
        error = sum((a - b) ** 2 for a, b in zip(s, t, strict=True))
        found.append(error / norms[1] + 1 - dot / (norms[0] * norms[1]) ** 0.5)
    return torch.stack(found).view(student.shape[:-1])


# ---------------------------------------------------------------------------------- distillation


def token_distance(student: Tensor, teacher: Tensor, weight: Tensor) -> Tensor:
    """Proteus: the mean squared difference of each row, summed by the rows' weights."""
    total = student.new_zeros(())
    for row in range(len(weight)):
        total = total + weight[row] * ((student[row] - teacher[row]) ** 2).mean()
    return total


def kl_of_cosines(
    student: Tensor, teacher: Tensor, bank: tuple[Tensor, Tensor], temp: float
) -> float:
    """KL of the softmax over cosines with rows of the bank (student, teacher): SEED, eq. 5."""

    def distribution(row: Tensor, others: Tensor) -> list[float]:
        cosines = [
            float(row @ other / (row.norm() * other.norm()).clamp(min=1e-12)) for other in others
        ]
        powers = [math.exp(cosine / temp) for cosine in cosines]
        return [power / sum(powers) for power in powers]

    ours, theirs = distribution(student, bank[0]), distribution(teacher, bank[1])
    return sum(p * (math.log(p) - math.log(q)) for p, q in zip(theirs, ours, strict=True))


def low_rank(x: Tensor, weight: Tensor, bias: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """W·x + bias + scale·B·(A·x), row by row."""
    rows = []
    for row in x:
        low = [sum(a[r, i] * row[i] for i in range(len(row))) for r in range(len(a))]
        rows.append(
            torch.stack(
                [
                    sum(weight[o, i] * row[i] for i in range(len(row)))
                    + bias[o]
                    + scale * sum(b[o, r] * low[r] for r in range(len(a)))
                    for o in range(len(weight))
                ]
            )
        )
    return torch.stack(rows)
