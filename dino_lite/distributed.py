"""Collectives that do nothing in one process, so that no caller asks how many there are."""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

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


def _leave_group() -> None:
    """At the end of this process, whoever started the group: gloo's threads may abort it (SIGABRT)
    where they outlive the interpreter. After an error nobody waits for the others.
    """
    failed = hasattr(sys, "last_value")
    if not failed and dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


atexit.register(_leave_group)
if hasattr(os, "register_at_fork"):  # the group is the parent's
    os.register_at_fork(after_in_child=lambda: atexit.unregister(_leave_group))


def all_gather_cat(tensor: Tensor) -> Tensor:
    """The rows of every process, in the order of ranks; processes may have different numbers of
    them.
    """
    return _gather(tensor)[0]


def all_gather_rows(tensor: Tensor) -> tuple[Tensor, int]:
    """`all_gather_cat`, and where this process's rows begin. The gradients of a row come back to
    its owner from all processes, summed: all of them take part in the backward pass.
    """
    if not is_distributed():
        return tensor, 0
    everyone, first = _GatherRows.apply(tensor)
    return everyone, first


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> tuple[Tensor, int]:
        everyone, first = _gather(tensor)
        ctx.own = slice(first, first + len(tensor))
        return everyone, first

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor, _: None) -> Tensor:
        return all_reduce_sum_(slope.clone())[ctx.own]


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """`tensor` added up over all processes; so are the gradients that come back to it, in whose
    backward pass all of them take part.
    """
    if not is_distributed():
        return tensor
    total: Tensor = _Sum.apply(tensor)
    return total


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return all_reduce_sum_(tensor.clone())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> Tensor:
        return all_reduce_sum_(slope.clone())


def _gather(tensor: Tensor) -> tuple[Tensor, int]:
    """The rows of every process, and where this one's begin."""
    if not is_distributed():
        return tensor, 0
    count = torch.tensor([len(tensor)], device=tensor.device)
    found = [torch.zeros_like(count) for _ in range(world_size())]
    dist.all_gather(found, count)
    counts = [int(n) for n in found]
    padded = tensor.new_zeros(max(counts), *tensor.shape[1:])
    padded[: len(tensor)] = tensor
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    everyone = torch.cat([part[:n] for part, n in zip(parts, counts, strict=True)])
    return everyone, sum(counts[: rank()])


def all_gather_objects(value: T) -> list[T]:
    """The plain `value` of every process, in the order of ranks."""
    if not is_distributed():
        return [value]
    found: list[Any] = [None] * world_size()
    dist.all_gather_object(found, value)
    return found


def all_reduce_sum_(tensor: Tensor) -> Tensor:
    """Add up `tensor` over all processes in place. Returns it."""
    if is_distributed():
        dist.all_reduce(tensor)
    return tensor


def all_reduce_mean_(tensor: Tensor) -> Tensor:
    """Average `tensor` over all processes in place (a sum divided here: gloo has no mean). Returns
    it.
    """
    if is_distributed():
        all_reduce_sum_(tensor).div_(world_size())
    return tensor


def all_reduce_logsumexp(tensor: Tensor) -> Tensor:
    """log Σ exp of each element over all processes. −inf is what one without rows has to add."""
    if not is_distributed():
        return tensor
    peak = tensor.clone()
    dist.all_reduce(peak, dist.ReduceOp.MAX)
    peak.clamp_(min=torch.finfo(peak.dtype).min)  # −inf − (−inf) is no number
    return peak + all_reduce_sum_((tensor - peak).exp()).log()


def broadcast_value(value: float, device: torch.device) -> float:
    """Rank 0's `value`, on every rank. Waits for the device if there are several."""
    if not is_distributed():
        return value
    tensor = torch.tensor(value, dtype=torch.float64, device=device)
    dist.broadcast(tensor, src=0)
    return tensor.item()
