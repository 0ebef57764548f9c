"""What a device can do at best, measured in a fraction of a second: products, copies, calls, and
how much memory is free.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from dino_lite.methods.timing import wait_for

_SECONDS = {"cpu": 0.05, "cuda": 0.002}  # at least, for each probe
_FLOATS = {"cpu": 2**18, "cuda": 2**23}  # of the tokens in the product
_COPY_BYTES = {"cpu": 64 * 2**20, "cuda": 256 * 2**20}  # larger than any cache
_CALLS = 100


class Peaks(NamedTuple):
    """`product`: FLOP/s of a ViT-like matrix product in the run's precision; `wide`: the same where
    the run needs at least float32; `copy`: bytes/s read and written; `call`: seconds of an
    operation on next to nothing; `memory`: bytes that are free on the device.
    """

    product: float
    wide: float
    copy: float
    call: float
    memory: int


def measure_peaks(accelerator: str, precision: str, width: int) -> Peaks:
    """Peaks of `accelerator` with torch's present number of threads, for a network of `width`.

    `precision` is trainer.precision. Leaves the global random state alone.
    """
    device = torch.device(accelerator)
    wide = torch.float64 if precision == "64" else torch.float32
    dtype = torch.bfloat16 if precision == "bf16" else wide
    memory = free_memory(accelerator)  # before the probes take some
    product = _product(device, dtype, width)
    peaks = Peaks(
        product=product,
        wide=product if dtype == wide else _product(device, wide, width),
        copy=_copy(device),
        call=_call(device),
        memory=memory,
    )
    if accelerator == "cuda":
        torch.cuda.empty_cache()  # what the probes held is the run's
    return peaks


def free_memory(accelerator: str) -> int:
    """Bytes that are free: on a GPU those of the present device, else what this machine (or the
    control group this process is in) has left.
    """
    if accelerator == "cuda":
        return int(torch.cuda.mem_get_info()[0])
    free = [_machine_memory()]
    group = Path("/sys/fs/cgroup")
    try:
        limit = (group / "memory.max").read_text().strip()
        free.append(int(limit) - int((group / "memory.current").read_text()))
    except (OSError, ValueError):  # no such group, or "max"
        pass
    return min(free)


def _machine_memory() -> int:
    """MemAvailable where Linux tells it, else all memory there is."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        fields = dict(line.split(":", 1) for line in lines)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _product(device: torch.device, dtype: torch.dtype, width: int) -> float:
    """FLOP/s of the first product of a block's MLP, tokens x width by width x 4 width."""
    rows = max(1, _FLOATS.get(device.type, _FLOATS["cuda"]) // width)
    generator = torch.Generator(device).manual_seed(0)  # constants would flatter some devices
    tokens = torch.randn(rows, width, device=device, generator=generator).to(dtype)
    weight = torch.randn(width, 4 * width, device=device, generator=generator).to(dtype)
    out = torch.empty(rows, 4 * width, device=device, dtype=dtype)
    return 8.0 * rows * width**2 / _quickest(lambda: torch.mm(tokens, weight, out=out), device)


def _copy(device: torch.device) -> float:
    """Bytes/s, each byte counted where it is read and where it is written."""
    num = _COPY_BYTES.get(device.type, _COPY_BYTES["cuda"])
    source = torch.ones(num // 4, device=device)
    target = torch.zeros_like(source)
    return 2.0 * num / _quickest(lambda: target.copy_(source), device)


def _call(device: torch.device) -> float:
    """Seconds the host spends on one small operation."""
    one = torch.ones((), device=device)

    def calls() -> None:
        for _ in range(_CALLS):
            torch.add(one, one)

    return _quickest(calls, device) / _CALLS


def _quickest(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of the quickest of several runs: others on the same machine only add to it."""
    # One thread is timed by the processor, and not while others have it.
    alone = device.type == "cpu" and torch.get_num_threads() == 1
    clock = time.thread_time if alone else time.perf_counter
    work()
    wait_for(device)
    times: list[float] = []
    while sum(times) < _SECONDS.get(device.type, _SECONDS["cuda"]) or not times:
        started = clock()
        work()
        wait_for(device)
        times.append(clock() - started)
    return min(times)
