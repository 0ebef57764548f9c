"""Builds Lightning's Trainer."""

from __future__ import annotations

import logging
import warnings

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Checkpoint, ProgressBar
from pytorch_lightning.strategies import DDPStrategy

from dino_lite.config import Config
from dino_lite.machine import Facts
from dino_lite.planning.groups import Trainer
from dino_lite.runs.checkpoint import read_checkpoint
from dino_lite.runs.metrics_file import MetricsFile
from dino_lite.runs.run import Run


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


def quiet_lightning() -> None:
    """Silence Lightning's messages that do not apply to dino_lite."""
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    for message in (
        ".*is smaller than the logging interval.*",
        ".*does not have many workers.*",
        ".*Checkpoint directory.*",
        ".*resuming from a checkpoint that ended before the epoch ended.*",
        ".*isinstance.treespec, LeafSpec.*",
    ):
        warnings.filterwarnings("ignore", message)
