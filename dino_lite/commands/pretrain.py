"""`dino-lite pretrain`: compose → open the data → facts → plan → build → lock and write the run →
train → measure.
"""

from __future__ import annotations

import functools
import gc
import logging
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Checkpoint, ProgressBar
from pytorch_lightning.strategies import DDPStrategy

from dino_lite import config as cfg
from dino_lite.backbones.blocks import set_memory
from dino_lite.callbacks.metrics import MetricsFile
from dino_lite.checkpoints import begin_config, build_method, read_checkpoint
from dino_lite.checks import check_values, mixes_images
from dino_lite.commands.tables import baseline_table
from dino_lite.config import Config, command, compose, get, instantiate, put
from dino_lite.contracts import Splits, UserError
from dino_lite.data.clean import CleanData
from dino_lite.data.datamodule import DataModule
from dino_lite.data.subset import Subset, spread
from dino_lite.distributed import alone, rank
from dino_lite.eval.baselines import knn_against_baselines
from dino_lite.eval.gallery import QUICK, draw_all
from dino_lite.eval.store import FeatureStore
from dino_lite.machine import Facts, environment, keep_freed_memory
from dino_lite.methods.clock import Clock
from dino_lite.methods.module import PretrainModule
from dino_lite.methods.step import Step
from dino_lite.methods.timing import is_out_of_memory
from dino_lite.optim.param_groups import param_groups
from dino_lite.plan import Plan, gather_facts, plan
from dino_lite.runs import (
    Run,
    absolute_paths,
    data_card,
    requested,
    resume_config,
    run_name,
    write_json,
)

_NUM_DRAWN = 2000  # training images among which neighbors are looked for


def pretrain(*overrides: str) -> dict[str, Any]:
    """Train as `dino-lite pretrain OVERRIDES` does; returns the run's results, its folder under
    "run".
    """
    return run_pretrain(compose("pretrain", overrides))


def run_pretrain(config: Config) -> dict[str, Any]:
    """Train, or go on where the same request stopped."""
    config = absolute_paths(config)
    check_values(config)
    request = requested(config)
    is_auto = get(config, "trainer.micro_batch_size") == "auto"
    config = begin_config(config)
    splits: Splits = instantiate(config["data"])
    facts = gather_facts(config, splits)
    planned = plan(config, facts)
    run = Run(Path(config["runs_dir"]).expanduser() / run_name(planned.config, request, facts))
    resuming = run.last.is_file()
    if resuming:
        config = resume_config(run, planned.config, request, splits, is_auto)
        if run.results().get("finished"):
            say(f"{run.folder} is finished; dino-lite evaluate checkpoint={run.folder} measures it")
            return run.results() | {"run": str(run.folder)}
    else:
        config = planned.config
    torch.set_num_threads(config["trainer"]["num_threads"])
    if facts.accelerator == "cpu":
        keep_freed_memory()
    # a resumed run has weights of its own
    begun = put(config, "checkpoint", None) if resuming else config
    built = build(begun, facts, splits, run)
    with run.locked() if rank() == 0 else nullcontext(), warnings.catch_warnings():
        if rank() == 0:
            say_plan(planned, run, facts, resuming)
            write_run(run, config, request, facts, splits)
        quiet_lightning()
        while not fit(config, facts, run, *built, resuming):  # out of memory in the first steps
            del built  # its memory is needed
            gc.collect()
            if facts.accelerator == "cuda":
                torch.cuda.empty_cache()
            size = smaller_micro_batch(config, is_auto)
            config, begun = (put(c, "trainer.micro_batch_size", size) for c in (config, begun))
            cfg.save(config, run.config_file)
            built = build(begun, facts, splits, run)
        if rank() != 0:
            return {}
        with alone():  # the other ranks are through
            return finish(run, config, facts, built[1], splits)


def fit(
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
        checkpoint = str(run.last) if resuming else None
        trainer.fit(module, datamodule, ckpt_path=checkpoint, weights_only=True)
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
            f"{run.folder} ran out of memory: give trainer.memory=low or a smaller "
            "trainer.micro_batch_size, and it goes on from its last checkpoint."
        ) from error
    finally:
        if trainer.is_global_zero:
            run.add_warnings([w for c in callbacks for w in getattr(c, "warnings", [])])
            for found in filter(None, (getattr(c, "results", None) for c in callbacks)):
                run.add_results(found)
    return True


def smaller_micro_batch(config: Config, is_auto: bool) -> int:
    """Half the micro-batch size that the device has no memory for. Raises UserError where another
    size changes the result, where the size was given, and below one image.
    """
    key, num_images = "trainer.micro_batch_size", config["loader"]["batch_size"]
    old = config["trainer"]["micro_batch_size"] or num_images
    new = -(-min(old, num_images) // 2)
    failed = f"Out of memory in the first steps, with micro-batches of {old} images"
    if not is_auto or old == 1:
        raise UserError(
            f"{failed}: give a smaller {key}, trainer.memory=low, a smaller loader.batch_size or a "
            "smaller backbone."
        )
    if mixes_images(config):
        raise UserError(
            f"{failed}: batch normalization, KoLeo or a coding rate looks at images together, so "
            f"that {key}={new} changes what is learned; give it all the same, or "
            "trainer.memory=low, or a smaller loader.batch_size."
        )
    paths = "; stochastic depth draws anew for each micro-batch"
    say(
        f"{failed}: starting anew with {key}={new}, which adds up to the same gradient"
        f"{paths if config['backbone'].get('drop_path') else ''}."
    )
    return int(new)


def build(
    config: Config, facts: Facts, splits: Splits, run: Run
) -> tuple[DataModule, PretrainModule, list[pl.Callback]]:
    """Data, method and step from a planned configuration; nothing is written."""
    loader, module = config["loader"], build_module(config, facts)
    datamodule = DataModule(
        splits,
        instantiate(config["augment"]),
        instantiate(config["normalize"]),
        batch_size=loader["batch_size"],
        num_workers=loader["num_workers"],
        seed=config["seed"],
        max_bad_fraction=loader["max_bad_fraction"],
        draft=loader["draft"],
        num_steps=module.clock.num_steps,
        bad_files=run.folder / "bad_files.csv",
    )
    double = str(config["trainer"]["precision"]) == "64"
    datamodule.dtype = torch.float64 if double else torch.float32
    callbacks = [instantiate(node) for node in (config["callbacks"] or {}).values() if node]
    return datamodule, module, callbacks


def build_module(config: Config, facts: Facts) -> PretrainModule:
    """Method and step, with the clock that measures the run."""
    trainer, optim = config["trainer"], config["optim"]
    step = functools.partial(
        Step,
        losses=instantiate(config["loss"]),
        learning_rate=instantiate(optim["learning_rate"]),
        weight_decay=instantiate(optim["weight_decay"]),
        clip=optim["clip"],
        clip_by=optim["clip_by"],
        freeze_last_layer=optim["freeze_last_layer"],
        max_skipped=optim["max_skipped"],
        micro_batch_size=trainer["micro_batch_size"],
        autocast=torch.bfloat16 if str(trainer["precision"]) == "bf16" else None,
        seed=config["seed"],
    )
    groups = functools.partial(
        param_groups,
        decay_tokens=optim["decay_tokens"],
        layer_decay=optim["layer_decay"],
        patch_embed_scale=optim["patch_embed_scale"],
        freeze_by=optim["freeze_by"],
    )
    method = build_method(config)
    set_memory(method, trainer["memory"], trainer["compile"])
    clock = Clock.of(trainer, facts.num_images, config["loader"]["batch_size"])
    module = PretrainModule(method, step, instantiate(optim["optimizer"]), clock, groups)
    module.bare_step()  # refuses what does not fit, now
    return module


def build_trainer(
    config: Config,
    facts: Facts,
    run: Run,
    num_steps: int | None,
    callbacks: list[pl.Callback],
    resuming: bool,
) -> pl.Trainer:
    """A Lightning Trainer that is told only what it needs: precision, micro-batches and schedules
    are the step's.
    """
    trainer = config["trainer"]
    ranks = trainer["devices"] * trainer["num_nodes"]
    resume_step = int(read_checkpoint(run.last)["global_step"]) if resuming else 0
    return pl.Trainer(
        accelerator=facts.accelerator,
        devices=trainer["devices"],
        num_nodes=trainer["num_nodes"],
        strategy=DDPStrategy(broadcast_buffers=False) if ranks > 1 else "auto",
        precision="64-true" if str(trainer["precision"]) == "64" else "32-true",
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


def write_run(run: Run, config: Config, request: Config, facts: Facts, splits: Splits) -> None:
    """The request, the configuration it became, and the data and machine it was settled for."""
    run.checkpoints.mkdir(parents=True, exist_ok=True)
    cfg.save(config, run.config_file)
    known = {"data": data_card(splits, facts), "request": request}
    write_json(run.environment_file, environment(facts) | known)


def finish(
    run: Run, config: Config, facts: Facts, module: PretrainModule, splits: Splits
) -> dict[str, Any]:
    """Mark the run as finished, draw what was learned, hold the teacher against its floors."""
    seconds_trained = round(module.clock.seconds, 1)
    steps = int(module.method.step)
    run.add_results({"finished": True, "steps": steps, "train_seconds": seconds_trained})
    if splits.test is not None and splits.test.labels is None:
        splits = splits._replace(test=None)
    device = torch.device(facts.accelerator)  # Lightning has moved the module to the host
    trained = module.method.export_backbone().float().to(device)
    data = clean_data(config, splits)
    draw_pictures(run, trained, data)
    if config["baselines"] and splits.train.labels is not None:
        run.add_results(knn_against_baselines(trained, data, int(config["seed"])))
        say(baseline_table(run.results()))
    say(f"pictures, curves and results: {run.folder}")
    say(f"dino-lite report checkpoint={run.folder} tells them on one page")
    return run.results() | {"run": str(run.folder)}


def clean_data(config: Config, splits: Splits) -> CleanData:
    """The data as evaluations see it, at the size of the global crops."""
    size, workers = config["augment"]["global_size"], config["loader"]["num_workers"]
    return CleanData(splits, size, instantiate(config["normalize"]), 256, workers)


def draw_pictures(run: Run, backbone: Any, data: CleanData) -> None:
    """attention.png, pca.png and neighbors.png, of training images spread over the whole set."""
    part = Subset(data.splits.train, spread(len(data.splits.train), _NUM_DRAWN))
    few = CleanData(Splits(part, None, data.splits.name), data.size, data.normalize, 256)
    draw_all(backbone, FeatureStore(few), run.folder, QUICK, say)


def say_plan(planned: Plan, run: Run, facts: Facts, resuming: bool) -> None:
    """What will happen, before it does."""
    data = f"{facts.source}: {facts.num_images:,} images of about {facts.width}x{facts.height}"
    labels = f"{facts.num_classes} classes, {facts.num_test:,} test images"
    labels = labels if facts.num_classes else "no labels"
    say(
        f"{'resuming' if resuming else 'run'} {run.folder}\n{data}, {labels}; device "
        f"{facts.device_name}"
    )
    if planned.decisions and not resuming:
        say(f"settled automatically (each can be given as KEY=VALUE):\n{planned.table()}")


def say(text: str) -> None:
    """Print on rank 0."""
    if rank() == 0:
        print(text, flush=True)


def quiet_lightning() -> None:
    """Silence what Lightning says to every caller and none can follow."""
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    for message in (
        ".*is smaller than the logging interval.*",
        ".*does not have many workers.*",
        ".*Checkpoint directory.*",
        ".*resuming from a checkpoint that ended before the epoch ended.*",
        ".*isinstance.treespec, LeafSpec.*",
    ):
        warnings.filterwarnings("ignore", message)


@command("pretrain")
def main(config: Config) -> None:
    """Command line."""
    run_pretrain(config)


if __name__ == "__main__":
    main()
