"""The EMA teacher: an exponential moving average of the student."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from dino_lite.contracts import Backbone, Progress, Schedule


def frozen_copy(module: nn.Module) -> nn.Module:
    """A deep copy without gradients and without stochastic layers (DropPath, Dropout); train or
    eval mode is kept.
    """
    twin = copy.deepcopy(module).requires_grad_(False)
    for part in twin.modules():
        # As in the reference, whose teacher has no stochastic depth and stays in train mode, so
        # that its batch normalization uses batch statistics.
        if type(part).__name__ == "DropPath":
            part.drop_prob = 0.0  # type: ignore[assignment]
        elif isinstance(part, nn.Dropout):
            part.p = 0.0
        elif isinstance(part, Backbone):
            part.disable_noise()
    return twin


@torch.no_grad()
def ema_(
    averages: Iterable[Tensor], values: Iterable[Tensor], momentum: float, ok: Bool[Tensor, ""]
) -> None:
    """average ← m·average + (1−m)·value, in place; unchanged if `ok` is false. Does not synchronize
    with the device.
    """
    targets = list(averages)
    if targets[0].device.type == "cpu":  # reading `ok` is free here, another pass is not
        if ok:
            torch._foreach_lerp_(targets, list(values), 1.0 - momentum)
        return
    moves = torch._foreach_sub(list(values), targets)
    weight: Float[Tensor, ""] = (1.0 - momentum) * ok.to(targets[0].dtype)
    torch._foreach_mul_(moves, weight)
    torch._foreach_add_(targets, moves)


class EMATeacher(nn.Module):
    """The student's running average (DINO, section 3.1): initialized as a copy and updated after
    every optimizer step.

    Batch-norm statistics are its own, unless it never runs in training: with `buffers`, those of
    the student are averaged too.
    """

    def __init__(self, student: nn.Module, momentum: Schedule, buffers: bool = False) -> None:
        super().__init__()
        self.module: Any = frozen_copy(student)
        self.momentum, self.with_buffers = momentum, buffers

    def after_step(self, student: nn.Module, at: Progress, ok: Bool[Tensor, ""]) -> None:
        """Update from `student`."""
        ours, theirs = (self._averaged(module) for module in (self.module, student))
        ema_(ours, theirs, self.momentum(at), ok)

    def _averaged(self, module: nn.Module) -> list[Tensor]:
        buffers = module.buffers() if self.with_buffers else ()
        return [*module.parameters(), *(each for each in buffers if each.is_floating_point())]
