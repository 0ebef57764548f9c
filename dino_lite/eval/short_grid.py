"""The short grid of the linear probe: what a CPU computes in minutes.

Features become coordinates in a basis of the training set, which loses nothing of it; rates come
in coarser steps; training ends once no head's loss falls further; with few images in the held-out
part, accuracies that it cannot tell apart are decided by the loss; and only the chosen head is
retrained and tested.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from dino_lite.eval.features import Pooled
from dino_lite.eval.probes import Head, LinearHeads, accuracy, batches, cosine, join, make_grid
from dino_lite.meter import metered

WINDOW = 100  # steps over which a training loss is averaged
CHOICE = "the lowest loss among those within a standard error of the best accuracy"  # choose_near
STILL = 0.01  # nats, and fraction: a loss that a window lowers by less stands still


class Found(NamedTuple):
    """All heads, the accuracy of each on the held-out part in percent, the index of the best, and
    which test images it classifies correctly after `num_steps` steps on all of train.
    """

    grid: list[Head]
    judged: Float[Tensor, "H"]
    chosen: int
    right: Bool[Tensor, "n"]
    num_steps: int


class ShortGrid(NamedTuple):
    """Settings of the heads: `length` gives batch size and steps for a number of images; `stops`:
    training may end earlier.
    """

    rates: Sequence[float]  # for 256 images
    num_classes: int
    length: Callable[[int], tuple[int, int]]
    stops: bool
    device: torch.device
    seed: int

    def search(
        self, kinds: Sequence[Head], fit: Pooled, held: Pooled, train: Pooled, test: Pooled
    ) -> Found:
        """Train on `fit` a head per kind of features (the columns that a head reads) and rate,
        choose by `held`, retrain on `train`, test.
        """
        grid, hits, losses, stills = list[Head](), [], [], list[int | None]()
        for kind in kinds:
            own, asked = in_span(kind, fit, held)
            title = f"training {len(self.rates)} heads on {kind.features}"
            heads, still = self.fitted(own, self.rates, title, self.stops)
            hit, loss = heads.measure(asked)
            hits.append(hit)
            losses.append(loss)
            grid += [kind._replace(base_rate=h.base_rate, rate=h.rate) for h in heads.grid]
            stills += [still] * len(heads.grid)
        chosen, judged = choose_near(torch.cat(hits, dim=1), torch.cat(losses))
        own, asked = in_span(grid[chosen], train, test)
        rate, still = grid[chosen].base_rate, stills[chosen]
        final, _ = self.fitted(own, [rate], "training the chosen head", False, still)
        num_steps = self.length(len(own.labels))[1]
        if still is not None:
            num_steps = min(num_steps, still + WINDOW)
        return Found(grid, judged, chosen, final.measure(asked)[0][:, 0], num_steps)

    def fitted(
        self,
        fit: Pooled,
        rates: Sequence[float],
        title: str,
        stops: bool,
        still: int | None = None,
    ) -> tuple[LinearHeads, int | None]:
        """Heads trained as by `train_until_still`, and its step."""
        batch_size, num_steps = self.length(len(fit.labels))
        grid = make_grid([1], [False], rates, batch_size)
        heads = LinearHeads(grid, fit, self.num_classes, self.device, self.seed)
        sizes = (batch_size, num_steps, self.seed)
        return heads, train_until_still(heads, fit, *sizes, title, stops, still)


def choose_near(
    correct: Bool[Tensor, "n H"], losses: Float[Tensor, "H"]
) -> tuple[int, Float[Tensor, "H"]]:
    """Of the heads whose accuracy is within a standard error of the best, the one with the lowest
    loss; and the accuracy of each in percent.
    """
    percents = accuracy(correct)
    share = float(percents.max()) / 100
    near = percents >= 100 * (share - math.sqrt(share * (1 - share) / len(correct)))
    losses = losses.nan_to_num(nan=math.inf)
    return int(torch.where(near, losses, math.inf).argmin()), percents


def train_until_still(
    heads: LinearHeads,
    pooled: Pooled,
    batch_size: int,
    num_steps: int,
    seed: int,
    title: str,
    stops: bool,
    still: int | None = None,
) -> int | None:
    """As `train` until the step `still`; from there, rates fall to 0 within `WINDOW` steps.

    If that is None and `stops`, it is the step at which a window has lowered no head's mean
    training loss by more than `STILL` nats and `STILL` of its value, if there is one. Returns it.
    """
    device = heads.weights[0].device
    window, before = torch.zeros(len(heads.grid), device=device), None
    numbered = batches(len(pooled.labels), batch_size, num_steps, seed)
    for step, numbers in enumerate(metered(numbered, num_steps, title, "steps")):
        rate = cosine(step, num_steps)
        if still is not None and step >= still:
            rate = min(rate, cosine(still, num_steps) * (1 - (step - still) / WINDOW))
            if rate <= 0:
                break
        window += heads.step(*join(pooled, numbers, device), rate) / WINDOW
        if stops and still is None and (step + 1) % WINDOW == 0:
            least = (STILL * window).clamp(min=STILL)
            if before is not None and not bool((before - window > least).any()):
                still = step + 1
            window, before = torch.zeros_like(window), window
    return still


def in_span(head: Head, fit: Pooled, *others: Pooled) -> list[Pooled]:
    """The columns that `head` reads of `fit` and `others`, as class tokens of a single block.

    With fewer rows in `fit` than columns, they are coordinates in an orthonormal basis of the span
    of these rows, which preserves every inner product with them: gradients lie in this span, so a
    linear head learns the same. Columns of zeros are left out.
    """
    parts = (fit, *others)
    rows = [part.features(head.num_blocks, head.patches).features for part in parts]
    used = (rows[0] != 0).any(dim=0)  # narrow stages of a convolutional network are padded
    rows = [each[:, used] for each in rows]
    if len(rows[0]) < rows[0].shape[1]:
        basis = torch.linalg.qr(rows[0].T).Q
        rows = [each @ basis for each in rows]
    return [
        Pooled(each[:, None], each[:, :0], part.labels, part.index)
        for each, part in zip(rows, parts, strict=True)
    ]
