"""What this machine has: devices, cores, and whether bfloat16 is worth using."""

from __future__ import annotations

import os

import torch

from dino_lite.contracts import UserError


def pick_accelerator(asked: str, key: str) -> str:
    """ "cpu", "cuda" or "mps": what `key` asks for, or the best there is."""
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    found = {"cuda": cuda, "gpu": cuda, "mps": mps, "cpu": True, "auto": True}
    if asked not in found:
        raise UserError(f"{key}={asked}: choose auto, cpu, cuda or mps.")
    if not found[asked]:
        raise UserError(f"{key}={asked}: torch finds no such device here; use auto or cpu.")
    best = "cuda" if cuda else "mps" if mps else "cpu"
    return {"auto": best, "gpu": "cuda"}.get(asked, asked)


def num_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def has_fast_bf16(accelerator: str) -> bool:
    """Whether bfloat16 matrix products are native; emulated ones were 150 times slower than
    float32.
    """
    if accelerator == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return accelerator == "cpu" and any(getattr(torch.cpu, p, lambda: False)() for p in probes)
