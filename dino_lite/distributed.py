"""Collectives that are no-ops in a single process, so callers need not distinguish the cases."""

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

_alone = 0  # nesting depth of `alone`


@contextmanager
def alone() -> Iterator[None]:
    """Context in which this process works without the others: collectives are no-ops."""
    global _alone
    _alone += 1
    try:
        yield
    finally:
        _alone -= 1


def is_distributed() -> bool:
    """Whether a process group with more than one member is initialized, outside of `alone`."""
    up = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    return up and not _alone


def srun_tasks() -> int:
    """Number of tasks that srun started for this program; 1 without srun, within an interactive
    shell, and in a task that uses torchrun. (An allocation alone sets SLURM_NTASKS.)
    """
    return 1 if "RANK" in os.environ else int(os.environ.get("SLURM_STEP_NUM_TASKS", "1"))


def rank() -> int:
    """This process's rank; before the group is initialized, read from the launcher's environment
    variables.
    """
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank()
    if srun_tasks() > 1:
        return int(os.environ["SLURM_PROCID"])
    return int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")))


def world_size() -> int:
    """Number of processes in the group; 1 inside `alone`."""
    return dist.get_world_size() if is_distributed() else 1


def start_group(accelerator: str) -> None:
    """Initialize the process group if a launcher (torchrun, srun) started several processes."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        if accelerator == "cuda":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        dist.init_process_group("nccl" if accelerator == "cuda" else "gloo")


def _leave_group() -> None:
    """Destroy the process group at exit, even one started by other code: gloo's threads may abort
    the process (SIGABRT) if they outlive the interpreter. Skipped after an error, since destroying
    waits for the other ranks.
    """
    failed = hasattr(sys, "last_value")
    if not failed and dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


atexit.register(_leave_group)
if hasattr(os, "register_at_fork"):  # the group belongs to the parent
    os.register_at_fork(after_in_child=lambda: atexit.unregister(_leave_group))


def all_gather_cat(tensor: Tensor) -> Tensor:
    """Concatenate the rows of all processes in rank order; their numbers may differ. Without
    gradients.
    """
    return _gather(tensor)[0]


def all_gather_rows(tensor: Tensor) -> tuple[Tensor, int]:
    """As `all_gather_cat` with gradients; also returns the index of this process's first row. The
    gradient of a row is summed over all processes, so all must run the backward pass.
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
    """Sum `tensor` over all processes. Its gradient is summed as well, so all processes must run
    the backward pass.
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
    """The rows of all processes, and the index of this process's first row."""
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
    """The picklable `value` of every process, in rank order."""
    if not is_distributed():
        return [value]
    found: list[Any] = [None] * world_size()
    dist.all_gather_object(found, value)
    return found


def all_reduce_sum_(tensor: Tensor) -> Tensor:
    """Sum `tensor` over all processes in place. Returns it."""
    if is_distributed():
        dist.all_reduce(tensor)
    return tensor


def all_reduce_mean_(tensor: Tensor) -> Tensor:
    """Average `tensor` over all processes in place (sum and division, as gloo has no mean). Returns
    it.
    """
    if is_distributed():
        all_reduce_sum_(tensor).div_(world_size())
    return tensor


def all_reduce_logsumexp(tensor: Tensor) -> Tensor:
    """Elementwise log Σ exp over all processes. A process without rows passes −inf."""
    if not is_distributed():
        return tensor
    peak = tensor.clone()
    dist.all_reduce(peak, dist.ReduceOp.MAX)
    peak.clamp_(min=torch.finfo(peak.dtype).min)  # −inf − (−inf) would be NaN
    return peak + all_reduce_sum_((tensor - peak).exp()).log()


def all_reduce_max(values: list[float], device: torch.device) -> list[float]:
    """The largest of each value over all processes. With several, synchronizes with the device."""
    if not is_distributed():
        return values
    tensor = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return [float(value) for value in tensor.tolist()]


def broadcast_value(value: float, device: torch.device) -> float:
    """Broadcast `value` from rank 0. With several ranks, synchronizes with the device."""
    if not is_distributed():
        return value
    tensor = torch.tensor(value, dtype=torch.float64, device=device)
    dist.broadcast(tensor, src=0)
    return tensor.item()
