"""The students of a distillation: which networks they are, and the run that trains them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from dino_lite.config import Config, compose, put
from dino_lite.contracts import UserError
from dino_lite.methods.student import OF_MASKED
from dino_lite.planning.checks import read_by


def student_nodes(asked: Any) -> dict[str, Config]:
    """The backbones that `students=` names, by the name of each student: files of conf/backbone or
    timm's names, one or a list; or NAME: {backbone: vit_small, KEY: VALUE, …} for settings of each.
    Raises UserError.
    """
    if not asked:
        raise UserError(
            "students= is missing: name the networks to train, as in students=[vit_tiny,convnet]."
        )
    if isinstance(asked, str):
        asked = [asked]
    if isinstance(asked, Sequence):
        names = [str(name) for name in asked]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise UserError(
                f"students names {twice} twice: give each a name of its own, as in students="
                f"{{a:{{backbone:{twice}}},b:{{backbone:{twice},drop_path:0.1}}}}."
            )
        asked = dict.fromkeys(names)
    if not isinstance(asked, Mapping):
        raise UserError(f"students={asked}: it must be a list of networks, as in [vit_tiny].")
    return {str(name): _node(str(name), given or {}) for name, given in asked.items()}


def _node(name: str, given: Config) -> Config:
    """The backbone of one student, without drop path if not asked for (DINOv3, section 5.1)."""
    if not re.fullmatch(r"[A-Za-z0-9][\w-]*", name):
        raise UserError(
            f"students: {name!r} cannot name a folder: use letters, digits, _ and -, as in "
            "students={small:{backbone:vit_small}}."
        )
    if not isinstance(given, Mapping):
        raise UserError(f"students.{name}={given}: it must be a group of settings of a backbone.")
    choice = str(given.get("backbone", name))
    try:
        node = compose("pretrain", [f"backbone={choice}"])["backbone"]
    except UserError as error:
        raise UserError(str(error).replace("backbone=", "students=", 1)) from None
    node = {key: value for key, value in node.items() if key != "pretrained"}
    if node.get("drop_path") == "auto":
        node["drop_path"] = 0.0
    return node | {key: value for key, value in given.items() if key != "backbone"}


def distill_config(config: Config, teacher: str, students: Mapping[str, Config]) -> Config:
    """The configuration of the run that trains `students`: `config` has the keys of pretrain."""
    first = next(iter(students.values()))
    stage = {"teacher": {"checkpoint": teacher, "digest": None}, "students": dict(students)}
    # Students first, so that their keys are named if they are wrong, not those of `backbone`.
    return stage | config | stage | {"backbone": first}


def settle_objective(config: Config) -> tuple[Config, list[tuple[str, Any, str]]]:
    """`config` with what its losses need: no masks where no loss reads masked patches; where no
    student has a mask token, no loss that does. Returns the decisions as key, value and reason.
    """
    reads = {name: read_by(name, loss) for name, loss in (config["loss"] or {}).items()}
    masks = any("mask_token" in node for node in config["students"].values())
    decisions: list[tuple[str, Any, str]] = []
    left_out = [name for name, match in reads.items() if match in OF_MASKED and not masks]
    if left_out:
        kept = {name: loss for name, loss in config["loss"].items() if name not in left_out}
        config = config | {"loss": kept}
        decisions += [(f"loss.{n}", None, "no student has a mask token") for n in left_out]
    matches = {match for name, match in reads.items() if name not in left_out}
    if config["method"].get("masking") and not matches & OF_MASKED:
        config = put(config, "method.masking", None)
        decisions.append(("method.masking", None, "no loss reads masked patches"))
    return config, decisions
