"""The students of a trained distillation: a folder for each, which is a run of its own."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from dino_lite.config import Config, save
from dino_lite.contracts import Backbone, Splits
from dino_lite.eval.curves import curves_picture
from dino_lite.eval.gallery import PICTURES
from dino_lite.runs.checkpoint import (
    method_weights,
    read_checkpoint,
    save_backbone,
    student_backbone,
)
from dino_lite.runs.finish import Say, finish
from dino_lite.runs.run import Run

_OF_STAGE = ("students", "finished")  # results that are not those of one student


def open_students(run: Run, config: Config) -> dict[str, Backbone]:
    """The average of each student in last.ckpt of the stage."""
    weights = method_weights(read_checkpoint(run.last))
    return {
        name: student_backbone(weights, config | {"backbone": node}, name).float()
        for name, node in config["students"].items()
    }


def finish_students(
    run: Run,
    config: Config,
    splits: Splits,
    backbones: Mapping[str, Backbone],
    device: torch.device,
    say: Say,
) -> None:
    """Write what is missing of each student's folder, finish it as a run, and mark the stage as
    finished.
    """
    for name, backbone in backbones.items():
        say(f"student {name}:")
        own = _write(run, config, name, backbone)
        finish(own, config_of(run, config, name), splits, backbone.to(device), say)
        say(f"pictures, curves and results: {own.folder}\n")
    run.add_results({"finished": True, "students": [*backbones]})


def config_of(run: Run, config: Config, name: str) -> Config:
    """The configuration of one student, with its backbone as the only one."""
    own = {"backbone": config["students"][name], "name": name, "runs_dir": str(run.folder)}
    return {key: value for key, value in config.items() if key != "students"} | own


def _write(run: Run, config: Config, name: str, backbone: Backbone) -> Run:
    """The files of a run in the student's folder. Those of an earlier training are replaced."""
    own, results = Run(run.folder / name), run.results()
    kept = {key: value for key, value in results.items() if key not in _OF_STAGE}
    own.folder.mkdir(parents=True, exist_ok=True)
    if own.last.is_file() and _same(own.results(), kept):
        return own
    own.clear(PICTURES)
    save(config_of(run, config, name), own.config_file)
    for file in (run.environment_file, run.folder / "crops.png"):
        if file.is_file():
            shutil.copyfile(file, own.folder / file.name)
    metrics = run.folder / "metrics.csv"
    if metrics.is_file():
        _write_metrics(metrics, own.folder / "metrics.csv", name, config["students"])
        if (config["callbacks"] or {}).get("pictures"):
            curves_picture(own.folder / "metrics.csv", own.folder / "curves.png")
    save_backbone(own.last, backbone, int(results["steps"]))
    own.add_results(kept)
    return own


def _same(ours: Mapping[str, Any], stage: Mapping[str, Any]) -> bool:
    """Whether the student's results are of this training of the stage."""
    return all(ours.get(key) == stage.get(key) for key in ("trained", "steps", "train_seconds"))


def _write_metrics(source: Path, target: Path, name: str, students: Mapping[str, Any]) -> None:
    """The columns of the stage's metrics that concern one student, under the names that they have
    in a run of its own: "STUDENT/knn" as "knn".
    """
    with source.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    columns = list(rows[0]) if rows else ["step"]
    of_students = {c: c.partition("/") for c in columns if c.partition("/")[0] in students}
    own = {last: column for column, (who, _, last) in of_students.items() if who == name}
    theirs = {last for _, _, last in of_students.values()}
    shared = {c: c for c in columns if c not in of_students and c not in theirs}
    kept = shared | own
    with target.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*kept])
        writer.writeheader()
        for row in rows:
            writer.writerow({short: row[column] for short, column in kept.items()})
