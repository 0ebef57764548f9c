"""The frozen teacher of a stage: which file it is, and how it is opened."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

from dino_lite.backbones.spec import build_backbone
from dino_lite.config import Config, instantiate, load
from dino_lite.contracts import Backbone, Trust, UserError
from dino_lite.data.preprocessing import Preprocessing
from dino_lite.formats.fit import fit_channels
from dino_lite.formats.head_weights import find_heads, head_of
from dino_lite.formats.tensors import weights_file
from dino_lite.formats.weights import read_weights
from dino_lite.methods.frozen import FrozenTeacher, Network
from dino_lite.nn.heads import DINOHead
from dino_lite.planning.checks import is_penalty
from dino_lite.runs.checkpoint import Checkpoint, find_checkpoint, open_backbone


def teacher_config(config: Config) -> Config:
    """`config` with the digest of the teacher that it names, if any. Raises UserError if it already
    has another digest.
    """
    asked = config.get("teacher")
    if not asked:
        return config
    found = digest_of(find_checkpoint(asked["checkpoint"], config["runs_dir"]))
    if asked.get("digest") not in (None, found):
        raise UserError(
            f"teacher={asked['checkpoint']} has changed since this run was started: restore the "
            "file, or choose another name= for a new run."
        )
    return config | {"teacher": asked | {"digest": found}}


def open_teacher(
    config: Config, trust: Trust = (), any_channels: bool = False
) -> FrozenTeacher | None:
    """The teacher that a planned configuration names, not read yet; None if it names none. With
    `any_channels`, one of RGB is converted to the channels of the images, as a student's weights.
    """
    asked = config.get("teacher")
    if not asked:
        return None
    read = functools.partial(_open, config, trust, any_channels)
    normalize = instantiate(config["normalize"])
    return FrozenTeacher(asked["checkpoint"], asked["digest"], read, normalize)


def start_of(config: Config) -> str | None:
    """What names the weights that a run begins with; None if they are drawn."""
    start: str | None = config.get("checkpoint") or config["backbone"].get("pretrained")
    return start


def begins_as_teacher(config: Config) -> bool:
    """Whether a run begins with the weights of its teacher."""
    digest: str = config["teacher"]["digest"]
    return _digest_of_start(config) == digest


def _digest_of_start(config: Config) -> str | None:
    start, teacher = start_of(config), config.get("teacher") or {}
    if start is None:
        return None
    if start == teacher.get("checkpoint"):
        digest: str = teacher["digest"]
        return digest
    return digest_of(find_checkpoint(start, config["runs_dir"]))


def frozen_files(config: Config) -> dict[str, tuple[str, str]]:
    """File and digest of the networks that take part in training as they are, by role: the
    "teacher", and the "start" if a penalty compares the student's weights with it.
    """
    teacher, found = config.get("teacher"), {}
    if teacher:
        found["teacher"] = (teacher["checkpoint"], teacher["digest"])
    reads_start = any(map(is_penalty, config["loss"].values()))
    if reads_start and (digest := _digest_of_start(config)) is not None:
        found["start"] = (start_of(config) or "", digest)
    return found


def _open(config: Config, trust: Trust, any_channels: bool) -> Network:
    asked = teacher_config(config)["teacher"]
    found = find_checkpoint(asked["checkpoint"], config["runs_dir"])
    opened = open_backbone(found, trust)
    how = config["normalize"]
    if any_channels and opened.backbone.in_chans != len(how["mean"]):
        backbone = _converted(opened.backbone, len(how["mean"]), trust, f"teacher={found}")
        size = opened.preprocessing.size
        return Network(backbone, Preprocessing(size, tuple(how["mean"]), tuple(how["std"])), {})
    return Network(opened.backbone, opened.preprocessing, _heads(found, opened.backbone))


def _converted(backbone: Backbone, in_chans: int, trust: Trust, asked: str) -> Backbone:
    """A backbone of RGB images for images of other channels. Raises UserError."""
    twin = build_backbone(backbone.stored_spec() | {"in_chans": in_chans}, trust)
    own = twin.state_dict()
    weights = {
        name: value if value.shape == own[name].shape else fit_channels(value, twin, asked).value
        for name, value in backbone.state_dict().items()
    }
    twin.load_state_dict(weights)
    return twin


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


def digest_of(checkpoint: Checkpoint) -> str:
    """16 hex digits over the content of the file of weights; of a timm model, over its name."""
    if checkpoint.path is None:
        return hashlib.sha256(checkpoint.name.encode()).hexdigest()[:16]
    file: Path = weights_file(checkpoint.path)
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()[:16]
