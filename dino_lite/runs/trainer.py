"""Builds Lightning's Trainer."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from pytorch_lightning.callbacks import Checkpoint, ProgressBar
from pytorch_lightning.plugins.environments import (  # type: ignore[attr-defined]
    ClusterEnvironment,
    LightningEnvironment,
    SLURMEnvironment,
)
from pytorch_lightning.strategies import DDPStrategy

from dino_lite.config import Config
from dino_lite.contracts import UserError
from dino_lite.distributed import srun_tasks, start_group
from dino_lite.machine import Facts
from dino_lite.planning.groups import Trainer
from dino_lite.runs.checkpoint import read_checkpoint
from dino_lite.runs.metrics_file import MetricsFile
from dino_lite.runs.run import Run

_SET_BY_LAUNCHER = ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "WORLD_SIZE")


def build_trainer(
    config: Config,
    facts: Facts,
    run: Run,
    num_steps: int | None,
    callbacks: list[pl.Callback],
    resuming: bool,
) -> pl.Trainer:
    """Build a Lightning Trainer. Autocast, micro-batches and schedules are handled by the step, so
    it gets none of these settings.
    """
    trainer = Trainer(**config["trainer"])
    ranks = trainer.devices * trainer.num_nodes
    resume_step = int(read_checkpoint(run.last)["global_step"]) if resuming else 0
    return pl.Trainer(
        accelerator=facts.accelerator,
        devices=trainer.devices,
        num_nodes=trainer.num_nodes,
        strategy=DDPStrategy(broadcast_buffers=False) if ranks > 1 else "auto",
        plugins=_launcher(trainer.devices),
        precision="64-true" if str(trainer.precision) == "64" else "32-true",
        max_epochs=-1,
        max_steps=-1 if num_steps is None else num_steps,
        logger=MetricsFile(run.folder / "metrics.csv", resume_step),
        callbacks=callbacks,
        log_every_n_steps=10 if facts.accelerator == "cpu" else 50,
        enable_checkpointing=any(isinstance(callback, Checkpoint) for callback in callbacks),
        enable_progress_bar=any(isinstance(callback, ProgressBar) for callback in callbacks),
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        default_root_dir=run.folder,
    )


def check_launcher(config: Config) -> None:
    """Raise UserError if srun started another number of processes than the run has: each would
    train on its own, in the same folder.
    """
    devices, nodes = (int(config["trainer"][key]) for key in ("devices", "num_nodes"))
    if (tasks := srun_tasks()) in (1, devices * nodes):
        return
    on = int(os.environ.get("SLURM_STEP_NUM_NODES", "1"))
    wanted = f"trainer.devices={tasks // on}" + (f" trainer.num_nodes={on}" if on > 1 else "")
    raise UserError(
        f"srun started {tasks} tasks, but the run has {devices * nodes}: say {wanted}, or start "
        f"srun with --ntasks={devices * nodes}."
    )


def _launcher(devices: int) -> ClusterEnvironment | None:
    """What started this run's processes: srun, or Lightning itself, also within an allocation of
    Slurm; None if Lightning finds out (torchrun).
    """
    if srun_tasks() > 1:
        os.environ.setdefault("SLURM_NTASKS_PER_NODE", str(devices))  # srun -n does not set it
        os.environ["SLURM_NTASKS"] = os.environ["SLURM_STEP_NUM_TASKS"]
        return SLURMEnvironment(auto_requeue=False)
    is_ours = "SLURM_NTASKS" in os.environ and not dist.is_torchelastic_launched()
    return LightningEnvironment() if is_ours else None


def join_ranks(accelerator: str) -> None:
    """Initialize the process group before any training if torchrun or srun started several
    processes.
    """
    if "RANK" in os.environ:
        start_group(accelerator)
    elif srun_tasks() > 1 and not dist.is_initialized():
        if accelerator == "cuda":
            torch.cuda.set_device(int(os.environ["SLURM_LOCALID"]))
        slurm = SLURMEnvironment(auto_requeue=False)
        dist.init_process_group(
            "nccl" if accelerator == "cuda" else "gloo",
            f"tcp://{slurm.main_address}:{slurm.main_port}",
            rank=slurm.global_rank(),
            world_size=srun_tasks(),
        )


@contextmanager
def as_command(module: str, overrides: Sequence[str]) -> Iterator[None]:
    """Context in which this program looks like `python -m MODULE OVERRIDES`. Lightning starts the
    other processes by running the program again, which is impossible for `python -c` and notebooks,
    and repeats all that a script did before.
    """
    main, argv = sys.modules["__main__"], sys.argv
    spec = getattr(main, "__spec__", None)
    before = {key: os.environ.get(key) for key in _SET_BY_LAUNCHER}
    had_group = dist.is_available() and dist.is_initialized()
    main.__spec__, sys.argv = find_spec(module), [module, *overrides]
    try:
        yield
    finally:  # so that the program can train again
        if dist.is_available() and dist.is_initialized() and not had_group:
            dist.destroy_process_group()
        main.__spec__, sys.argv = spec, argv
        for key, value in before.items():
            os.environ.pop(key, None)
            os.environ |= {} if value is None else {key: value}


def quiet_lightning() -> None:
    """Silence messages of Lightning and torch that do not apply to dino_lite, or that users cannot
    act on.
    """
    for name in ("pytorch_lightning", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # "No CUDA runtime is found", when something is compiled on a machine without a GPU
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    for message in (
        ".*is smaller than the logging interval.*",
        ".*does not have many workers.*",
        ".*Checkpoint directory.*",
        ".*resuming from a checkpoint that ended before the epoch ended.*",
        ".*isinstance.treespec, LeafSpec.*",
        ".*broadcast_buffers. is deprecated.*",
        ".*`srun` command is available.*",
    ):
        warnings.filterwarnings("ignore", message)
