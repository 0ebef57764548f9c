"""Trains a run to its end, with smaller micro-batches if it runs out of memory."""

from __future__ import annotations

import gc
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytorch_lightning as pl
import torch

from dino_lite.config import Config, put, save
from dino_lite.contracts import Interrupted, UserError
from dino_lite.data.datamodule import DataModule
from dino_lite.interrupts import Stopped, by_signal, number_of
from dino_lite.machine import Facts
from dino_lite.methods.module import PretrainModule
from dino_lite.planning.checks import mixes_images, traits_of
from dino_lite.runs.checkpoint import read_checkpoint
from dino_lite.runs.run import Run
from dino_lite.runs.timing import is_out_of_memory
from dino_lite.runs.trainer import build_trainer
from dino_lite.wording import count

Built = tuple[DataModule, PretrainModule, list[pl.Callback]]

_KEY = "trainer.micro_batch_size"


def train(
    config: Config,
    facts: Facts,
    run: Run,
    built: list[Built],
    rebuild: Callable[[Config], Built],
    resuming: bool,
    *,
    may_shrink: bool,
    say: Callable[[str], None],
) -> PretrainModule:
    """Train the one element of `built`, which `rebuild` builds again from a planned `config`.
    Returns the module, on the CPU.

    If a single device runs out of memory in the first steps and `may_shrink`, the run is built
    again from scratch with half the micro-batch size, which is saved in config.yaml. Raises
    UserError if that does not help, and Interrupted after a signal.
    """
    if config["trainer"]["compile"] and not traits_of(config).convolutional:
        say("compiling the network in the first step, which takes a minute or more")
    parts = built.pop()  # the only reference, so that its memory can be freed
    while not _fit(config, facts, run, *parts, resuming):
        del parts
        gc.collect()
        if facts.accelerator == "cuda":
            torch.cuda.empty_cache()
        config = put(config, _KEY, _smaller_micro_batch(config, may_shrink, say))
        save(config, run.config_file)
        parts = rebuild(config)
    return parts[1]


def _fit(
    config: Config,
    facts: Facts,
    run: Run,
    datamodule: DataModule,
    module: PretrainModule,
    callbacks: list[pl.Callback],
    resuming: bool,
) -> bool:
    """Train. Returns False if a run on one device ran out of memory in its first steps."""
    trainer = build_trainer(config, facts, run, module.clock.num_steps, callbacks, resuming)
    ctrl_c = signal.getsignal(signal.SIGINT)
    try:
        last = str(run.last) if resuming else None
        with _others_end_too(trainer.strategy.launcher):
            trainer.fit(module, datamodule, ckpt_path=last, weights_only=True)
    except SystemExit as stop:  # Stopped, or raised by Lightning after an Interrupt
        if not trainer.is_global_zero:
            raise SystemExit(0) from None  # rank 0 tells
        cause = stop if isinstance(stop, Stopped) else stop.__context__
        raise _interrupted(run, module, number_of(cause)) from None
    except (RuntimeError, MemoryError) as error:
        if "DataLoader worker" in str(error) and "killed" in str(error):
            raise UserError(
                f"{run.folder}: the system killed a loader worker, as it does when memory runs "
                "out: set a smaller loader.num_workers, and run the same command again."
            ) from error
        if not is_out_of_memory(error):
            raise
        if trainer.world_size == 1 and module.clock.seconds_per_step is None:
            return False
        raise UserError(
            f"{run.folder} ran out of memory: set trainer.memory=low or a smaller {_KEY} to "
            "resume it from its last checkpoint."
        ) from error
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, ctrl_c)  # Lightning ignores it after an Interrupt
        if trainer.is_global_zero:
            run.add_warnings([w for c in callbacks for w in getattr(c, "warnings", [])])
            for results in filter(None, (getattr(c, "results", None) for c in callbacks)):
                run.add_results(results)
    return True


@contextmanager
def _others_end_too(launcher: Any) -> Iterator[None]:
    """Context in which an error ends the processes that Lightning's `launcher` has started: their
    exit codes would make it kill this one, and with it the other jobs of a sweep.
    """
    try:
        yield
    except Exception:
        if processes := getattr(launcher, "procs", None):
            launcher.kill(signal.SIGKILL)
            processes.clear()  # which Lightning's observer watches
        raise


def _interrupted(run: Run, module: PretrainModule, number: int) -> Interrupted:
    """The sentence that ends an interrupted run: from where the same command continues."""
    where = f"{run.folder} was interrupted{by_signal(number)}"
    if not run.last.is_file():
        text = f"{where} before anything was saved; run the same command to start again."
        return Interrupted(text, number)
    saved = int(read_checkpoint(run.last)["global_step"])
    done = module.trainer.global_step
    lost = " (the steps since then are lost)" if done > saved else ""
    text = f"{where}; run the same command to resume it after step {saved:,}{lost}."
    return Interrupted(text, number)


def _smaller_micro_batch(config: Config, may_shrink: bool, say: Callable[[str], None]) -> int:
    """Half of the micro-batch size that did not fit. Raises UserError if that would change the
    result, if the user gave the size, or if it is one image already.
    """
    num_images = config["loader"]["batch_size"]
    old = config["trainer"]["micro_batch_size"] or num_images
    new = -(-min(old, num_images) // 2)
    failed = f"Out of memory in the first steps, with micro-batches of {count(old, 'image')}"
    if not may_shrink or old == 1:
        raise UserError(
            f"{failed}: set a smaller {_KEY}, trainer.memory=low, a smaller loader.batch_size, or "
            "a smaller backbone."
        )
    if mixes_images(config):
        raise UserError(
            f"{failed}: batch normalization, KoLeo or a coding rate depends on all images of a "
            f"micro-batch, so {_KEY}={new} would change the result; set it explicitly, or "
            "trainer.memory=low, or a smaller loader.batch_size."
        )
    paths = "; stochastic depth is drawn for each micro-batch"
    say(
        f"{failed}: restarting with {_KEY}={new}, which gives the same gradient"
        f"{paths if config['backbone'].get('drop_path') else ''}."
    )
    return int(new)
