"""Trains or resumes a run from its composed configuration: check values → open the data → facts
→ plan → build → lock and write the run → train → finish.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from dino_lite import config as cfg
from dino_lite.config import Config, get
from dino_lite.contracts import Backbone, Interrupted, Splits
from dino_lite.distributed import alone, rank
from dino_lite.eval.gallery import PICTURES
from dino_lite.interrupts import by_signal, number_of
from dino_lite.machine import Facts, environment, keep_freed_memory
from dino_lite.planning.checks import check_values
from dino_lite.planning.overview import embedded, network_size, overview
from dino_lite.planning.plan import Plan, gather_facts, open_splits, plan
from dino_lite.runs.begin import begin_config
from dino_lite.runs.build import build
from dino_lite.runs.checkpoint import find_checkpoint, open_backbone
from dino_lite.runs.finish import finish
from dino_lite.runs.identity import absolute_paths, data_card, requested, run_name
from dino_lite.runs.lengths import other_length
from dino_lite.runs.resume import resume_config
from dino_lite.runs.run import Run, read_json, write_json
from dino_lite.runs.student_folders import finish_students, open_students
from dino_lite.runs.trainer import check_launcher, quiet_lightning
from dino_lite.runs.training import Built, train
from dino_lite.runs.trust import targets


def run_pretrain(
    config: Config, before: Callable[[Run, Config], None] | None = None
) -> dict[str, Any]:
    """Train, or resume the run of the same request. `before` is called on the first rank with the
    run, once it is written, and its planned configuration, before training.
    """
    config = check_values(absolute_paths(config))
    check_launcher(config)
    request, named = requested(config), config["name"] != "auto"
    is_auto = get(config, "trainer.micro_batch_size") == "auto"
    trust = config.get("trust")
    config = begin_config(config)
    splits = open_splits(config["data"])
    facts = gather_facts(config, splits)
    planned = plan(config, facts)
    run = Run(Path(config["runs_dir"]).expanduser() / run_name(planned.config, request, facts))
    resuming = run.last.is_file()
    if resuming:
        config = resume_config(run, planned.config, request, splits, is_auto, trust)
        if run.is_trained():
            state = "finished" if run.results().get("finished") else "trained"
            say(f"{run.folder} is {state}; dino-lite evaluate checkpoint={run.folder} evaluates it")
            if rank() == 0:
                with run.locked(), alone():
                    return _finish(run, config, facts, splits, _trained(run, config, planned))
            return {}
    else:
        config = planned.config
    torch.set_num_threads(config["trainer"]["num_threads"])
    if facts.accelerator == "cpu":
        keep_freed_memory()
    started = without_start(config) if resuming else {}

    def build_run(config: Config) -> Built:
        return build(config | started, facts, splits, run, trust)

    built = [build_run(config)]  # errors are raised before anything is written
    with run.locked() if rank() == 0 else nullcontext(), warnings.catch_warnings():
        quiet_lightning()
        if rank() == 0:
            # Of a resumed run, the saved configuration decides.
            shown = Plan(config, [] if resuming else planned.decisions)
            say_plan(shown, run, facts, splits, network_size(built[0][1].method.export_backbone()))
            other = None if resuming or named else other_length(run, request)
            begun = begins_with(config, built[0][1].method.notes)
            notes = (*splits.left_out, *facts.warnings, *embedded(config), other, begun)
            for note in filter(None, notes):
                say(f"{note}\n")
            if not resuming:
                run.clear([*PICTURES, "crops", "curves"])
            write_run(run, config, request, facts, splits)
            if before is not None:
                before(run, config)
        module = train(config, facts, run, built, build_run, resuming, may_shrink=is_auto, say=say)
        if rank() != 0:
            return {}
        spent = {"steps": int(module.method.step), "train_seconds": round(module.clock.seconds, 1)}
        run.add_results({"trained": True} | spent)
        with alone():  # the other ranks have finished
            return _finish(run, config, facts, splits, module.method.export_backbones())


def write_run(run: Run, config: Config, request: Config, facts: Facts, splits: Splits) -> None:
    """Write the planned configuration, and the request, data and machine it is based on."""
    run.checkpoints.mkdir(parents=True, exist_ok=True)
    cfg.save(config, run.config_file)
    if run.last.is_file():  # resumed: newer keys are not part of it
        request = read_json(run.environment_file)["request"]
    known = {"data": data_card(splits, facts), "request": request}
    write_json(run.environment_file, environment(facts) | known)


def _trained(run: Run, config: Config, planned: Plan) -> Mapping[str, Backbone]:
    """The backbones of a trained run by student; "" for the only one."""
    if config.get("students"):
        return open_students(run, config)
    checkpoint = find_checkpoint(str(run.last), config["runs_dir"])
    # The user's command names the same classes, so they are trusted.
    trust = [*targets([planned.config["backbone"], planned.config["method"]])]
    return {"": open_backbone(checkpoint, trust).backbone}


def _finish(
    run: Run, config: Config, facts: Facts, splits: Splits, backbones: Mapping[str, Backbone]
) -> dict[str, Any]:
    """Add missing pictures and baselines to the trained run, or to the folders of its students;
    returns its results. Raises Interrupted after a signal.
    """
    device = torch.device(facts.accelerator)
    backbones = {name: backbone.float() for name, backbone in backbones.items()}
    try:
        if config.get("students"):
            finish_students(run, config, splits, backbones, device, say)
            return run.results() | {"run": str(run.folder)}
        finish(run, config, splits, backbones[""].to(device), say)
    except KeyboardInterrupt as stop:
        number = number_of(stop)
        raise Interrupted(
            f"{run.folder} was interrupted{by_signal(number)}, but is trained and saved; run the "
            "same command to finish it.",
            number,
        ) from None
    say(f"pictures, curves and results: {run.folder}")
    say(f"dino-lite report checkpoint={run.folder} shows them on one page")
    return run.results() | {"run": str(run.folder)}


def say_plan(
    planned: Plan, run: Run, facts: Facts, splits: Splits, network: Mapping[str, int]
) -> None:
    """Print the run and its plan: at most ten lines, or every decision with plan=full."""
    resuming = run.last.is_file()
    say(f"{'resuming' if resuming else 'run'} {run.folder}")
    say(overview(planned, facts, network, splits.labels_from))
    if planned.config["plan"] == "full" and planned.decisions:
        say(f"all automatic choices:\n{planned.table()}")
    say("")


def without_start(config: Config) -> Config:
    """The changes that keep a resumed run, which loads its own weights, from reading others."""
    return {"checkpoint": None, "backbone": config["backbone"] | {"pretrained": None}}


def begins_with(config: Config, notes: Sequence[str]) -> str | None:
    """What is said of the weights with which a run begins, if there is anything to say."""
    start = config.get("checkpoint") or config["backbone"].get("pretrained")
    return "\n  ".join((f"begins with {start}:", *notes)) if notes else None


def say(text: str) -> None:
    """Print on rank 0."""
    if rank() == 0:
        print(text, flush=True)
