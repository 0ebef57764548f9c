"""Functions and commands in processes of their own, one or several that work together. They are
forked from a server that has imported torch and the commands once; an interpreter of its own would
spend seconds on that for each.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from dino_lite.overrides import quote_override

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    [*(f"dino_lite.commands.{name}" for name in ("pretrain", "adapt", "check", "report")), "pytest"]
)


def on_ranks(world_size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What `function(rank, *arguments)` returned in each gloo process: tensors and plain values."""
    with tempfile.TemporaryDirectory() as folder:
        given = (world_size, folder, function, arguments)
        mp.start_processes(_one_rank, given, nprocs=world_size, start_method="forkserver")
        files = [Path(folder) / f"{rank}.pt" for rank in range(world_size)]
        return [torch.load(file, weights_only=True) for file in files]


def _one_rank(
    rank: int, world_size: int, folder: str, function: Callable[..., Any], arguments: Any
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=world_size)
    torch.save(function(rank, *arguments), Path(folder) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def apart(function: Callable[..., None], *arguments: Any) -> None:
    """`function(*arguments)` in another process, where shapes are not checked and torch.compile
    compiles. Raises what it raised.
    """
    mp.start_processes(_apart, (function, arguments), start_method="forkserver")


def _apart(_: int, function: Callable[..., None], arguments: Any) -> None:
    import torch._dynamo

    torch._dynamo.config.disable = False
    function(*arguments)


def command(
    name: str, *arguments: str, ranks: int = 1, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """`dino-lite NAME ARGUMENTS`, run as by torchrun where there are several ranks: the exit code
    of the first, and what all of them printed.
    """
    environments: list[dict[str, str]] = [{}]
    if ranks > 1:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            meet = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1])}
        meet["WORLD_SIZE"] = str(ranks)
        environments = [meet | {"RANK": str(i), "LOCAL_RANK": str(i)} for i in range(ranks)]
    with tempfile.TemporaryDirectory() as folder:
        streams = [Path(folder) / stream for stream in ("stdout", "stderr")]
        processes: list[Any] = [
            SERVER.Process(
                target=_command,
                args=(name, arguments, cwd or Path.cwd(), dict(os.environ) | given, streams),
            )
            for given in environments
        ]
        for process in processes:
            process.start()
        deadline = time.monotonic() + 300
        for process in processes:
            process.join(max(deadline - time.monotonic(), 0))
            process.kill()
            process.join()
        said = [stream.read_text() for stream in streams]
    return subprocess.CompletedProcess([name, *arguments], processes[0].exitcode, *said)


def _command(
    name: str, arguments: tuple[str, ...], cwd: Path, environment: dict[str, str], streams: Any
) -> None:
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    for number, stream in enumerate(streams, start=1):
        os.dup2(os.open(stream, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    sys.argv = [name, *map(quote_override, arguments)]
    importlib.import_module(f"dino_lite.commands.{name}").main()
