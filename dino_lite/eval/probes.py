"""A grid of linear classifiers, trained together on the same batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dino_lite.eval.features import Pooled
from dino_lite.meter import metered

MOMENTUM = 0.9
_WEIGHT_STD = 0.01
_CELLS = 2**25  # logits held at once in `measure`


class Head(NamedTuple):
    """One linear classifier: it reads class tokens of the last `num_blocks` blocks, with `patches`
    also the mean patch token; `base_rate` is per 256 images, `rate` for the actual batch size.
    """

    num_blocks: int
    patches: bool
    base_rate: float
    rate: float

    @property
    def features(self) -> str:
        """The features it reads, in words."""
        classes = "CLS" if self.num_blocks == 1 else f"CLS of {self.num_blocks} blocks"
        return f"{classes} + mean patch" if self.patches else classes

    def columns(self, num_blocks: int, cls_dim: int, patch_dim: int) -> slice:
        """Its columns of a row: class tokens of `num_blocks` blocks, then the mean patch token."""
        end = num_blocks * cls_dim
        return slice(end - self.num_blocks * cls_dim, end + (patch_dim if self.patches else 0))


def make_grid(
    blocks: Sequence[int], patches: Sequence[bool], base_rates: Sequence[float], batch_size: int
) -> list[Head]:
    """Every combination, in order; a head is identified by its position."""
    return [
        Head(num, with_patches, base, base * batch_size / 256)
        for num in blocks
        for with_patches in patches
        for base in base_rates
    ]


class _Stack(NamedTuple):
    """R heads that read the same columns, stacked into one matrix product."""

    columns: slice
    weight: Float[Tensor, "RC D"]
    bias: Float[Tensor, "RC"]
    weight_moment: Float[Tensor, "RC D"]
    bias_moment: Float[Tensor, "RC"]
    rate: Float[Tensor, "RC 1"]

    def logits(self, rows: Float[Tensor, "b W"], num_classes: int) -> Float[Tensor, "b R C"]:
        read = rows[:, self.columns]
        return torch.addmm(self.bias, read, self.weight.T).view(len(rows), -1, num_classes)


class LinearHeads:
    """All heads of a grid, trained by SGD on the sum of their cross-entropies.

    A row holds an image's class tokens of the last blocks, oldest first, then its mean patch token.
    Heads are independent: each is trained as it would be alone. Weights are initialized from N(0,
    0.01²), drawn from `seed`, biases with 0; `weights[i]` and `biases[i]` are writable views of
    head i's.
    """

    def __init__(
        self, grid: Sequence[Head], like: Pooled, num_classes: int, device: torch.device, seed: int
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        _, num_blocks, cls_dim = like.cls.shape
        self.grid, self.num_classes, self.stacks = list(grid), num_classes, list[_Stack]()
        self.weights, self.biases = list[Tensor](), list[Tensor]()
        for _, same in groupby(grid, lambda head: (head.num_blocks, head.patches)):
            heads = list(same)
            columns = heads[0].columns(num_blocks, cls_dim, like.patches.shape[1])
            shape = (len(heads) * num_classes, columns.stop - columns.start)
            drawn = torch.empty(shape, dtype=like.cls.dtype).normal_(generator=generator)
            weight = drawn.mul_(_WEIGHT_STD).to(device)
            bias = torch.zeros_like(weight[:, 0])
            rate = torch.tensor([head.rate for head in heads], dtype=weight.dtype, device=device)
            rate = rate.repeat_interleave(num_classes)[:, None]
            moments = torch.zeros_like(weight), torch.zeros_like(bias)
            self.stacks.append(_Stack(columns, weight, bias, *moments, rate))
            self.weights += weight.view(len(heads), num_classes, -1).unbind(0)
            self.biases += bias.view(len(heads), num_classes).unbind(0)

    def step(
        self, rows: Float[Tensor, "b W"], labels: Int[Tensor, "b"], factor: float
    ) -> Float[Tensor, "H"]:
        """One step of SGD at `factor` times each head's rate; returns the losses before it."""
        losses = []
        for stack in self.stacks:
            log_probs = stack.logits(rows, self.num_classes).log_softmax(-1)
            own = labels[:, None, None].expand(-1, log_probs.shape[1], 1)
            losses.append(-log_probs.gather(-1, own)[..., 0].mean(dim=0))
            # Gradient of the mean cross-entropy: (softmax - one-hot) / b.
            slope = log_probs.exp_().scatter_add_(-1, own, rows.new_full(own.shape, -1.0))
            slope = slope.div_(len(rows)).view(len(rows), -1)
            stack.weight_moment.addmm_(slope.T, rows[:, stack.columns], beta=MOMENTUM)
            stack.bias_moment.mul_(MOMENTUM).add_(slope.sum(dim=0))
            stack.weight.addcmul_(stack.rate, stack.weight_moment, value=-factor)
            stack.bias.addcmul_(stack.rate[:, 0], stack.bias_moment, value=-factor)
        return torch.cat(losses)

    def measure(self, pooled: Pooled) -> tuple[Bool[Tensor, "N H"], Float[Tensor, "H"]]:
        """Whether each head classifies each image correctly, and each head's mean cross-entropy; on
        the host.
        """
        block = max(1, _CELLS // (len(self.grid) * self.num_classes))
        hits, total = [], torch.zeros(len(self.grid), dtype=torch.float64)
        for start in range(0, len(pooled.labels), block):
            numbers = torch.arange(start, min(start + block, len(pooled.labels)))
            rows, labels = join(pooled, numbers, self.weights[0].device)
            logits = torch.cat([s.logits(rows, self.num_classes) for s in self.stacks], dim=1)
            own = labels[:, None, None].expand(-1, logits.shape[1], 1)
            hits.append((logits.argmax(dim=-1) == labels[:, None]).cpu())
            total -= logits.log_softmax(-1).gather(-1, own)[..., 0].sum(dim=0).double().cpu()
        return torch.cat(hits), total / len(pooled.labels)


def train(
    heads: LinearHeads,
    pooled: Pooled,
    batch_size: int,
    num_steps: int,
    seed: int,
    cosine_per: str = "step",
    after_epoch: Callable[[], None] | None = None,
    title: str = "training",
) -> None:
    """`num_steps` steps over shuffled epochs, dropping incomplete batches; rates follow half a
    cosine to 0, updated each step or each epoch. `after_epoch` is called after each epoch and at
    the end. The meter has the name `title`.
    """
    device = heads.weights[0].device
    epoch = len(pooled.labels) // batch_size
    held = epoch if cosine_per == "epoch" else 1
    numbered = batches(len(pooled.labels), batch_size, num_steps, seed)
    for step, numbers in enumerate(metered(numbered, num_steps, title, "steps")):
        rows, labels = join(pooled, numbers, device)
        heads.step(rows, labels, cosine(step // held * held, num_steps))
        if after_epoch is not None and ((step + 1) % epoch == 0 or step + 1 == num_steps):
            after_epoch()


def choose(
    correct: Bool[Tensor, "n H"], losses: Float[Tensor, "H"]
) -> tuple[int, Float[Tensor, "H"]]:
    """The most accurate head, and the accuracy of each.

    Ties are broken by the lowest loss; a head that has diverged comes last.
    """
    percents, losses = accuracy(correct), losses.nan_to_num(nan=math.inf)
    order = sorted(range(len(losses)), key=lambda i: (-float(percents[i]), float(losses[i])))
    return order[0], percents


def accuracy(correct: Bool[Tensor, "n H"]) -> Float[Tensor, "H"]:
    """Percent correct of each head."""
    return (100.0 * correct.double()).mean(dim=0)


def cosine(step: int, num_steps: int) -> float:
    """Half a cosine from 1 towards 0 at `num_steps`."""
    return 0.5 * (1 + math.cos(math.pi * step / num_steps))


def join(
    pooled: Pooled, numbers: Int[Tensor, "b"], device: torch.device
) -> tuple[Float[Tensor, "b W"], Int[Tensor, "b"]]:
    """Rows as heads read them, and their labels, on `device`."""
    rows = torch.cat([pooled.cls[numbers].flatten(1), pooled.patches[numbers]], dim=1)
    return rows.to(device), pooled.labels[numbers].to(device)


def batches(num: int, batch_size: int, num_steps: int, seed: int) -> Iterator[Int[Tensor, "b"]]:
    """Indices of `num_steps` batches of shuffled epochs; incomplete batches are dropped."""
    generator = torch.Generator().manual_seed(seed)
    done = 0
    while done < num_steps:
        order = torch.randperm(num, generator=generator)
        for start in range(0, num - batch_size + 1, batch_size):
            if done < num_steps:
                yield order[start : start + batch_size]
            done += 1
