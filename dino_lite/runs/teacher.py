"""The frozen teacher of a stage: which file it is, and how it is opened."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

from dino_lite.config import Config, instantiate, load
from dino_lite.contracts import Backbone, Trust, UserError
from dino_lite.formats.head_weights import find_heads, head_of
from dino_lite.formats.tensors import weights_file
from dino_lite.formats.weights import read_weights
from dino_lite.methods.frozen import FrozenTeacher, Network
from dino_lite.nn.heads import DINOHead
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
    found = find_checkpoint(asked["checkpoint"], config["runs_dir"])
    opened = open_backbone(found, trust)
    return Network(opened.backbone, opened.preprocessing, _heads(found, opened.backbone))


def _heads(checkpoint: Checkpoint, backbone: Backbone) -> dict[str, DINOHead]:
    """The projection heads in the file of a checkpoint, those of the teacher of a run. Of a run
    that shares one head, it is the one for patches too.
    """
    if checkpoint.path is None:
        return {}
    found = find_heads(read_weights(checkpoint.path, "teacher").tensors)
    heads = {kind: head_of(weights, f"teacher={checkpoint}") for kind, weights in found.items()}
    if checkpoint.run is not None and set(heads) == {"head"}:
        method = load(checkpoint.run.config_file)["method"]
        if method.get("masking") and not method.get("patch_head"):
            heads["patch_head"] = heads["head"]
    width = backbone.embed_dim
    return {kind: head for kind, head in heads.items() if head.in_dim == width}


def _digest(checkpoint: Checkpoint) -> str:
    """16 hex digits over the content of the file of weights; of a timm model, over its name."""
    if checkpoint.path is None:
        return hashlib.sha256(checkpoint.name.encode()).hexdigest()[:16]
    file: Path = weights_file(checkpoint.path)
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()[:16]
