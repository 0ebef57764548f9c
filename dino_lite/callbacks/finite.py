"""Checks that the state of a run is finite."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any, cast

import pytorch_lightning as pl
import torch
from torch import Tensor

from dino_lite.contracts import UserError


def demand_finite(trainer: pl.Trainer, constant: Collection[str], path: Path) -> None:
    """Raise UserError if a step found the run to have diverged, or if a tensor is not finite, so
    that `path` is not written; buffers in `constant` may be. All ranks see the same.
    """
    module = cast(Any, trainer.lightning_module)
    module.check()
    tensors = module.state_dict()
    for optimizer in trainer.optimizers:
        for number, state in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{number}.{key}": value for key, value in state.items()}
    wrong = [name for name in not_finite(tensors) if name not in constant]
    if wrong:
        kept = f"the earlier {path.name} is kept" if path.is_file() else "nothing was saved"
        raise UserError(
            f"{wrong[0]} is not finite after step {trainer.global_step}"
            f"{f', and {len(wrong) - 1} other tensors' if wrong[1:] else ''}: the run has "
            f"diverged, and {kept}; {module.remedy}."
        )


def not_finite(tensors: dict[str, Any]) -> list[str]:
    """Names of the floating-point tensors that contain NaN or infinity. Synchronizes once."""
    floats = {
        name: value.detach()
        for name, value in tensors.items()
        if isinstance(value, Tensor) and value.is_floating_point() and value.numel()
    }
    if not floats:
        return []
    largest = torch._foreach_norm(list(floats.values()), float("inf"))
    finite = [each.isfinite().to(largest[0].device) for each in largest]
    fine = torch.stack(finite).tolist()
    return [name for name, is_fine in zip(floats, fine, strict=True) if not is_fine]
