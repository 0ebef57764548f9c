"""Collectives that do nothing in one process, so that no caller asks how many there are."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")

_alone = 0  # how many `alone` are open


@contextmanager
def alone() -> Iterator[None]:
    """What this process does without the others: collectives wait for nobody in here."""
    global _alone
    _alone += 1
    try:
        yield
    finally:
        _alone -= 1


def is_distributed() -> bool:
    """True where a process group is up and has more than one member, and none is `alone`."""
    up = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    return up and not _alone


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


def start_group(accelerator: str) -> None:
    """Join the other processes, where a launcher (torchrun, srun) has started several."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        if accelerator == "cuda":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        dist.init_process_group("nccl" if accelerator == "cuda" else "gloo")


def all_gather_cat(tensor: Tensor) -> Tensor:
    """The rows of every process, in the order of ranks; processes may have different numbers of
    them.
    """
    if not is_distributed():
        return tensor
    count = torch.tensor([len(tensor)], device=tensor.device)
    counts = [torch.zeros_like(count) for _ in range(world_size())]
    dist.all_gather(counts, count)
    most = max(int(n) for n in counts)
    padded = tensor.new_zeros(most, *tensor.shape[1:])
    padded[: len(tensor)] = tensor
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return torch.cat([part[: int(n)] for part, n in zip(parts, counts, strict=True)])


def all_gather_objects(value: T) -> list[T]:
    """The plain `value` of every process, in the order of ranks."""
    if not is_distributed():
        return [value]
    found: list[Any] = [None] * world_size()
    dist.all_gather_object(found, value)
    return found


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
