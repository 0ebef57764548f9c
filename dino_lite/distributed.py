"""Collectives that do nothing in one process, so that no caller asks how many there are."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from torch import Tensor


def is_distributed() -> bool:
    """True where a process group is up and has more than one member."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank() -> int:
    """This process's rank; before the group is up, what the launcher wrote into the environment."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank()
    for variable in ("RANK", "SLURM_PROCID", "LOCAL_RANK"):
        if variable in os.environ and (variable != "SLURM_PROCID" or "SLURM_NTASKS" in os.environ):
            return int(os.environ[variable])
    return 0


def world_size() -> int:
    """How many processes train together."""
    return dist.get_world_size() if is_distributed() else 1


def all_reduce_mean_(tensor: Tensor) -> Tensor:
    """Average `tensor` over all processes in place (a sum divided here: gloo has no mean). Returns
    it.
    """
    if is_distributed():
        dist.all_reduce(tensor)
        tensor /= world_size()
    return tensor


def broadcast_value(value: float, device: torch.device) -> float:
    """Rank 0's `value`, on every rank. Waits for the device if there are several."""
    if not is_distributed():
        return value
    tensor = torch.tensor(value, dtype=torch.float64, device=device)
    dist.broadcast(tensor, src=0)
    return tensor.item()
