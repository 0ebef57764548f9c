"""LARS: layer-wise adaptive rate scaling (You et al. 2017, arXiv 1708.03888)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from dino_lite.settings.kinds import Fraction, NonNegative, Positive


class LARS(torch.optim.Optimizer):
    """LARS as used by DINO: μ ← momentum·μ + q·d, p ← p − lr·μ.

    d is the gradient plus weight_decay·p, q the trust ratio eta·‖p‖/‖d‖ (1 if either norm is 0).
    One-dimensional parameters (biases, norms) have neither: d is the gradient, q is 1. If
    `found_inf`, which is set externally as for torch's fused optimizers, is not 0, a step changes
    nothing. Does not synchronize with the device.
    """

    _step_supports_amp_scaling = True  # `found_inf` is then set as a tensor on the device
    found_inf: Tensor | None = None

    def __init__(
        self,
        params: Iterable[Any],
        lr: NonNegative = 0.0,
        weight_decay: NonNegative = 0.0,
        momentum: Fraction = 0.9,
        eta: Positive = 0.001,
    ) -> None:
        defaults = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "eta": eta}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters that have a gradient."""
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                self._update(params, group)
        return result

    def _update(self, params: list[Tensor], group: dict[str, Any]) -> None:
        maps = [p for p in params if p.ndim != 1]
        params = maps + [p for p in params if p.ndim == 1]
        gradients = [p.grad for p in params if p.grad is not None]
        moves = gradients[len(maps) :]
        if maps:
            decay, eta = group["weight_decay"], group["eta"]
            moves = _trusted(maps, gradients[: len(maps)], decay, eta) + moves
        for p in params:
            if not self.state[p]:
                self.state[p]["mu"] = torch.zeros_like(p)
        averages = [self.state[p]["mu"] for p in params]
        moved = list(torch._foreach_mul(averages, group["momentum"]))
        torch._foreach_add_(moved, moves)
        rate: Any = -group["lr"]
        if self.found_inf is not None:
            bad = self.found_inf > 0
            # 0·NaN is NaN: selected by where, not masked by a factor.
            moved = [torch.where(bad, a, b) for a, b in zip(averages, moved, strict=True)]
            rate = (~bad).to(params[0].dtype) * rate
        torch._foreach_copy_(averages, moved)
        torch._foreach_mul_(moved, rate)
        torch._foreach_add_(params, moved)


def _trusted(
    params: list[Tensor], gradients: list[Tensor], weight_decay: float, eta: float
) -> list[Tensor]:
    """q·d of each parameter."""
    slopes = list(torch._foreach_add(gradients, params, alpha=weight_decay))
    length, slope = (torch.stack(list(torch._foreach_norm(each))) for each in (params, slopes))
    trust = torch.where((length > 0) & (slope > 0), eta * length / slope, 1.0)
    torch._foreach_mul_(slopes, list(trust))
    return slopes
