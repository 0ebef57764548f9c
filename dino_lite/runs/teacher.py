"""The frozen teacher of a stage: which file it is, and how it is opened."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

from dino_lite.config import Config, instantiate
from dino_lite.contracts import Trust, UserError
from dino_lite.formats.tensors import weights_file
from dino_lite.methods.frozen import FrozenTeacher, Network
from dino_lite.runs.checkpoint import Checkpoint, find_checkpoint, open_backbone


def teacher_config(config: Config) -> Config:
    """`config` with the digest of the teacher that it names, if any. Raises UserError if it already
    has another digest.
    """
    asked = config.get("teacher")
    if not asked:
        return config
    found = _digest(find_checkpoint(asked["checkpoint"], config["runs_dir"]))
    if asked.get("digest") not in (None, found):
        raise UserError(
            f"teacher={asked['checkpoint']} has changed since this run was started: restore the "
            "file, or choose another name= for a new run."
        )
    return config | {"teacher": asked | {"digest": found}}


def open_teacher(config: Config, trust: Trust = ()) -> FrozenTeacher | None:
    """The teacher that a planned configuration names, not read yet; None if it names none."""
    asked = config.get("teacher")
    if not asked:
        return None
    read = functools.partial(_open, config, trust)
    normalize = instantiate(config["normalize"])
    return FrozenTeacher(asked["checkpoint"], asked["digest"], read, normalize)


def _open(config: Config, trust: Trust) -> Network:
    asked = teacher_config(config)["teacher"]
    opened = open_backbone(find_checkpoint(asked["checkpoint"], config["runs_dir"]), trust)
    return Network(opened.backbone, opened.preprocessing, {})


def _digest(checkpoint: Checkpoint) -> str:
    """16 hex digits over the content of the file of weights; of a timm model, over its name."""
    if checkpoint.path is None:
        return hashlib.sha256(checkpoint.name.encode()).hexdigest()[:16]
    file: Path = weights_file(checkpoint.path)
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()[:16]
