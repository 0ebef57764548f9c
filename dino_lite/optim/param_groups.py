"""Which parameters decay, and how gradients are bounded."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

# Learned tokens and positions are inputs, not maps: shrinking them means nothing. The references
# decay them all the same.
TOKENS = ("cls_token", "pos_embed", "register_tokens", "mask_token", "weight_g")


def param_groups(
    named: Iterable[tuple[str, nn.Parameter]], decay_tokens: bool = False
) -> list[dict[str, Any]]:
    """Two groups for an optimizer: decayed and not. Biases and one-dimensional parameters never
    decay.

    `decay_tokens` decays learned tokens, positions and the prototypes' lengths too, as DINO does.
    Each group carries `decay` (whether the weight-decay schedule is written to it) and the `names`
    of its parameters. Parameters that require no gradient are left out.
    """
    groups: dict[bool, dict[str, Any]] = {
        decay: {"params": [], "names": [], "decay": decay, "weight_decay": 0.0}
        for decay in (True, False)
    }
    for name, parameter in named:
        if not parameter.requires_grad:
            continue
        exempt = name.endswith(".bias") or parameter.ndim == 1
        exempt |= not decay_tokens and name.rsplit(".", 1)[-1] in TOKENS
        groups[not exempt]["params"].append(parameter)
        groups[not exempt]["names"].append(name)
    return [group for group in groups.values() if group["params"]]


ClipBy = Literal["global", "parameter"]


def clip_gradients_(
    gradients: Sequence[Tensor], limit: float, by: ClipBy = "global"
) -> Float[Tensor, ""]:
    """Scale gradients down to an L2 norm of `limit`, in place; returns the norm of all of them
    before that.

    `by="parameter"` bounds each tensor on its own, as DINO's code does (it changes the direction of
    the step); `limit` 0 bounds nothing. Nothing waits for the device.
    """
    norms = torch._foreach_norm(list(gradients))
    total: Tensor = torch.linalg.vector_norm(
        torch.stack([norm.to(norms[0].dtype) for norm in norms])
    )
    if limit > 0:
        if by == "global":
            factor = (limit / (total + 1e-6)).clamp(max=1.0)
            torch._foreach_mul_(list(gradients), factor)
        else:
            factors = [(limit / (norm + 1e-6)).clamp(max=1.0) for norm in norms]
            torch._foreach_mul_(list(gradients), factors)
    return total
