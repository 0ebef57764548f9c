"""Properties of this machine: devices, cores, bfloat16 support. With those of the data, they are
the facts that a plan is based on.
"""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import subprocess
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dino_lite.contracts import UserError
from dino_lite.version import __version__


class Facts(NamedTuple):
    """Properties of data and machine that `plan` depends on; equal facts give equal plans."""

    source: str
    num_images: int
    num_test: int
    num_classes: int
    height: int  # median, pixels
    width: int
    channels: int
    mean: tuple[float, ...]  # per channel, in [0, 1], over a sample of the images
    std: tuple[float, ...]
    accelerator: str  # "cpu", "cuda" or "mps"
    device_name: str
    num_devices: int
    num_cores: int
    bf16: bool  # the device multiplies bfloat16 matrices faster than float32 ones
    sizes: str = ""  # of the images of the sample: "37x301 to 320x40 pixels"
    compiler: bool = False  # torch.compile has the compiler it needs for the device
    warnings: tuple[str, ...] = ()  # about the data, for the user


def pick_accelerator(asked: str, key: str) -> str:
    """ "cpu", "cuda" or "mps": the accelerator `asked` for by `key`; for "auto" the best available.
    Raises UserError if it is not available.
    """
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    found = {"cuda": cuda, "gpu": cuda, "mps": mps, "cpu": True, "auto": True}
    if asked not in found:
        raise UserError(f"{key}={asked}: choose auto, cpu, cuda or mps.")
    if not found[asked]:
        raise UserError(f"{key}={asked}: torch finds no such device; use auto or cpu.")
    best = "cuda" if cuda else "mps" if mps else "cpu"
    return {"auto": best, "gpu": "cuda"}.get(asked, asked)


def num_cores() -> int:
    """Number of cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def loader_workers(asked: int | str, accelerator: str) -> int:
    """`num_workers`; for "auto" a number of this process's share of the cores: on a CPU a quarter,
    as most are left to the model, else all but one, 16 at most.
    """
    if isinstance(asked, int):
        return asked
    own = num_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if accelerator == "cpu":
        return 0 if own < 2 else max(1, own // 4)
    return max(1, min(16, own - 1))


def has_fast_bf16(accelerator: str) -> bool:
    """Whether bfloat16 matrix products are native; emulated ones were measured to be 150 times
    slower than float32.
    """
    if accelerator == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return accelerator == "cpu" and any(getattr(torch.cpu, p, lambda: False)() for p in probes)


def has_compiler(accelerator: str) -> bool:
    """Whether torch.compile finds what it needs: its C++ compiler and, on a GPU, Triton."""
    usual = "clang++" if platform.system() == "Darwin" else "g++"
    found = shutil.which(os.environ.get("CXX") or usual) is not None
    return found and (accelerator == "cpu" or find_spec("triton") is not None)


def keep_freed_memory() -> None:
    """Make malloc keep freed memory in this process. By default, glibc returns large blocks to the
    system, which clears their pages when they are allocated again, at every step
    (docs/performance.md).
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        most = 2**31 - 1
        # M_MMAP_THRESHOLD: size above which blocks are mapped; some versions take 32 MiB at most
        if libc.mallopt(-3, most) or libc.mallopt(-3, 32 * 2**20):
            libc.mallopt(-1, most)  # M_TRIM_THRESHOLD: free memory above which it is returned


def environment(facts: Facts) -> dict[str, Any]:
    """Versions, commit and machine, to reproduce the run."""
    packages = ("torch", "torchvision", "timm", "pytorch-lightning")
    return {
        "dino_lite": __version__,
        "git": _revision(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in packages},
        "machine": {
            "platform": platform.platform(),
            "device": facts.device_name,
            "cores": facts.num_cores,
        },
    }


def _revision() -> str | None:
    """Commit of the checkout; None for an installed package, or without git."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None
    line = ["git", "-C", str(root), "rev-parse", "HEAD"]
    try:
        return subprocess.run(line, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
