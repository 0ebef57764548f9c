"""Training a run to its end, in smaller micro-batches where the memory asks for it."""

from __future__ import annotations

import gc
from collections.abc import Callable

import pytorch_lightning as pl
import torch

from dino_lite.config import Config, put, save
from dino_lite.contracts import UserError
from dino_lite.data.datamodule import DataModule
from dino_lite.machine import Facts
from dino_lite.methods.module import PretrainModule
from dino_lite.methods.timing import is_out_of_memory
from dino_lite.planning.checks import mixes_images
from dino_lite.runs.run import Run
from dino_lite.runs.trainer import build_trainer

Built = tuple[DataModule, PretrainModule, list[pl.Callback]]

_KEY = "trainer.micro_batch_size"


def train(
    config: Config,
    facts: Facts,
    run: Run,
    build: Callable[[Config], Built],
    *,
    resuming: bool,
    may_shrink: bool,
    say: Callable[[str], None],
) -> PretrainModule:
    """Train what `build` makes of the planned `config`; returns the module, on the host.

    Where one device has too little memory for the first steps and `may_shrink`, it is built anew
    with half the micro-batch size, which config.yaml then keeps. Raises UserError where that does
    not help, or where the user interrupts the run.
    """
    built = build(config)
    while not _fit(config, facts, run, *built, resuming):
        del built  # its memory is needed
        gc.collect()
        if facts.accelerator == "cuda":
            torch.cuda.empty_cache()
        config = put(config, _KEY, _smaller_micro_batch(config, may_shrink, say))
        save(config, run.config_file)
        built = build(config)
    return built[1]


def _fit(
    config: Config,
    facts: Facts,
    run: Run,
    datamodule: DataModule,
    module: PretrainModule,
    callbacks: list[pl.Callback],
    resuming: bool,
) -> bool:
    """Train; False where the memory of the only device did not suffice for the first steps."""
    trainer = build_trainer(config, facts, run, module.clock.num_steps, callbacks, resuming)
    try:
        last = str(run.last) if resuming else None
        trainer.fit(module, datamodule, ckpt_path=last, weights_only=True)
    except SystemExit:  # how Lightning ends after Ctrl-C
        raise UserError(
            f"{run.folder} was interrupted; the same command goes on from there."
        ) from None
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        if trainer.world_size == 1 and module.clock.seconds_per_step is None:
            return False
        raise UserError(
            f"{run.folder} ran out of memory: give trainer.memory=low or a smaller {_KEY}, and it "
            "continues from its last checkpoint."
        ) from error
    finally:
        if trainer.is_global_zero:
            run.add_warnings([w for c in callbacks for w in getattr(c, "warnings", [])])
            for results in filter(None, (getattr(c, "results", None) for c in callbacks)):
                run.add_results(results)
    return True


def _smaller_micro_batch(config: Config, may_shrink: bool, say: Callable[[str], None]) -> int:
    """Half the micro-batch size that did not fit; refuses where that would change the result, where
    the user gave the size, and below one image.
    """
    num_images = config["loader"]["batch_size"]
    old = config["trainer"]["micro_batch_size"] or num_images
    new = -(-min(old, num_images) // 2)
    failed = f"Out of memory in the first steps, with micro-batches of {old} images"
    if not may_shrink or old == 1:
        raise UserError(
            f"{failed}: give a smaller {_KEY}, trainer.memory=low, or a smaller loader.batch_size "
            "or backbone."
        )
    if mixes_images(config):
        raise UserError(
            f"{failed}: batch normalization, KoLeo or a coding rate looks at images together, so "
            f"that {_KEY}={new} changes what is learned; give it all the same, or "
            "trainer.memory=low, or a smaller loader.batch_size."
        )
    paths = "; stochastic depth draws anew for each micro-batch"
    say(
        f"{failed}: starting anew with {_KEY}={new}, which adds up to the same gradient"
        f"{paths if config['backbone'].get('drop_path') else ''}."
    )
    return int(new)
