"""`dino-lite distill`: trains small backbones, the students, to match a large frozen one."""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from dino_lite.config import Config, command, compose, instantiate
from dino_lite.contracts import UserError
from dino_lite.formats.publish import publish
from dino_lite.formats.safetensors import SafeTensors
from dino_lite.overrides import job_arguments, quote_override
from dino_lite.planning.checks import check_values
from dino_lite.planning.groups import Distill
from dino_lite.planning.plan import gather_facts, open_splits, plan
from dino_lite.planning.students import distill_config, student_nodes
from dino_lite.report.origin import training
from dino_lite.report.originals import to_export
from dino_lite.runs.begin import begin_config, build_method
from dino_lite.runs.checkpoint import find_checkpoint, open_backbone
from dino_lite.runs.identity import absolute_paths
from dino_lite.runs.pretraining import say
from dino_lite.runs.run import Run
from dino_lite.runs.sequence import LAST, Sequence, Stage
from dino_lite.settings.validate import validated
from dino_lite.wording import count

_OWN = ("teacher", "students", "distill")  # keys of this command


def distill(*overrides: str) -> dict[str, Any]:
    """Train as `dino-lite distill OVERRIDES` does; returns the folder as "run", the path of the
    result, and the results by stage and student.
    """
    config = compose("distill", overrides)
    return run_distill(config, [quote_override(override) for override in overrides])


def run_distill(config: Config, arguments: list[str]) -> dict[str, Any]:
    """Train the students in one stage, or in a chain of stages, and export them."""
    config = absolute_paths(config)
    asked = Distill(**validated(Distill, config["distill"], "distill."))
    students = student_nodes(config["students"])
    teacher = _teacher(config)
    config |= {"teacher": teacher, "students": students}
    base = {key: value for key, value in config.items() if key not in _OWN}
    whole = check_values(distill_config(base, teacher, students))
    splits = open_splits(whole["data"])
    sequence = Sequence("distill", config, splits.name, arguments)
    if not sequence.at.exists():
        _check(whole, asked.chain)
    after = partial(_export, config=whole) if asked.export else None
    if not asked.chain:
        results = sequence.run([_stage("01_distill", base, teacher, students, after)])
        if results and len(students) > 1:
            first, *others = students
            folder = sequence.folder / "01_distill"
            also = ", ".join(str(folder / name) for name in others)
            say(f"checkpoint={sequence.folder} opens {first}, the first student; besides: {also}")
        return results
    stages = []
    for number, (name, node) in enumerate(students.items(), start=1):
        stages.append(_stage(f"{number:02d}_{name}", base, teacher, {name: node}, after))
        teacher = str((sequence.folder / stages[-1].name / name).absolute())
    return sequence.run(stages)


def _stage(name: str, base: Config, teacher: str, students: dict[str, Config], after: Any) -> Stage:
    """A stage that trains `students`; its result is the first of them."""
    config = distill_config(base, teacher, students)
    result = f"{next(iter(students))}/{LAST}"
    title = teacher if teacher.startswith("timm:") else Path(teacher).name
    return Stage(name, config, f"new {', '.join(students)}", title, result, after)


def _teacher(config: Config) -> str:
    """The teacher, by a name that stays the same in the folder of a stage. Raises UserError."""
    asked = config["teacher"]
    if not isinstance(asked, str) or not asked:
        raise UserError(
            "teacher= is missing: name what the students learn from, a run, an exported folder, a "
            "file of weights or timm:NAME."
        )
    if asked == "latest":
        raise UserError(
            "teacher=latest: name the run to learn from; once the students are trained, one of "
            "them would be the latest."
        )
    try:
        found = find_checkpoint(asked, config["runs_dir"])
    except UserError as error:
        raise UserError(str(error).replace("checkpoint=", "teacher=", 1)) from None
    if found.path is None:
        return asked
    whole = found.run is not None and found.path == found.run.last
    return str((found.run.folder if whole and found.run else found.path).absolute())


def _check(config: Config, chain: bool) -> None:
    """Refuse what cannot be trained before anything is written: builds the students once. Raises
    UserError.
    """
    begun = begin_config(config)
    planned = plan(begun, gather_facts(begun, open_splits(begun["data"]))).config
    build_method(planned, config.get("trust"))
    if not chain:
        return
    opened = open_backbone(find_checkpoint(config["teacher"]["checkpoint"], config["runs_dir"]))
    sizes = {"the teacher": _size(opened.backbone)}
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        for name, node in planned["students"].items():
            sizes[name] = _size(instantiate(node))
    names = [*sizes]
    for before, name in pairwise(names):
        if sizes[name] > sizes[before]:
            raise UserError(
                f"distill.chain=true: {name} has {sizes[name]:,} parameters, more than the "
                f"{sizes[before]:,} of {before}: name students from large to small, or set "
                "distill.chain=false."
            )


def _size(backbone: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in backbone.parameters())


def _export(run: Run, config: Config) -> dict[str, Any]:
    """Export each student of a trained stage to its folder; returns what was measured of it."""
    found = {}
    splits = open_splits(config["data"])
    for name in run.results()["students"]:
        own = run.folder / name
        checkpoint = find_checkpoint(str(own), run.folder)
        opened = open_backbone(checkpoint, config.get("trust"))
        ready, original = to_export(opened, splits, training(checkpoint, opened))
        folder = own / "export" / SafeTensors.name
        publish(SafeTensors(), ready, folder, original)
        say(f"{name}: {count(_size(opened.backbone), 'parameter')}, exported to {folder}")
        found[name] = Run(own).results()
    return found


@command("distill")
def main(config: Config) -> None:
    """Command line."""
    run_distill(config, job_arguments())


if __name__ == "__main__":
    main()
