"""Checkpoints: resolves what `checkpoint=` names, and opens its backbone."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from dino_lite.backbones.spec import build_backbone
from dino_lite.config import Config, load
from dino_lite.contracts import Backbone, Trust, UserError
from dino_lite.data.names import file_name
from dino_lite.data.preprocessing import Preprocessing
from dino_lite.data.stage_data import own_collection
from dino_lite.formats.opened import Opened
from dino_lite.formats.plain import Layout
from dino_lite.formats.safetensors import open_export
from dino_lite.formats.sound import refuse_unsound
from dino_lite.formats.tensors import read_about, weights_file
from dino_lite.formats.torch_files import load_inert
from dino_lite.formats.weights import open_timm, open_weights
from dino_lite.runs.fresh import fresh_backbone, fresh_method
from dino_lite.runs.old_names import current
from dino_lite.runs.run import Run
from dino_lite.runs.sequence_folder import SequenceFolder, title_of
from dino_lite.runs.trust import demand_trust, targets

_TIMM = "timm:"
_TEACHER = "teachers.ema.module."  # in the state dict of a method
_BACKBONE = f"{_TEACHER}backbone."


class Checkpoint(NamedTuple):
    """A resolved `checkpoint=`.

    "run": a file in runs/NAME/checkpoints. "export": a folder written by `dino-lite export`.
    "file": weights of any program (for a Hugging Face folder, the file inside). "timm": a timm
    model by name, without a path.
    """

    kind: Literal["run", "export", "file", "timm"]
    name: str  # for messages: the path, or timm:NAME
    path: Path | None
    run: Run | None
    results_file: Path  # results.json of the run or export, else NAME.results.json

    def __str__(self) -> str:
        return self.name

    @property
    def title(self) -> str:
        """Base name of the file or folder, or timm:NAME."""
        return self.name if self.path is None else self.path.name

    @property
    def which(self) -> str | None:
        """ "last" or "best" for a checkpoint of a run, else None."""
        return None if self.run is None or self.path is None else self.path.stem


def find_checkpoint(checkpoint: str | None, runs_dir: str | Path) -> Checkpoint:
    """Resolve what the user named: a run (its last.ckpt), a sequence (the result of its last
    finished stage), a .ckpt file, an export, a file or folder of third-party weights, "timm:NAME",
    or "latest".

    Results of a timm model are kept in `runs_dir`. Raises UserError if nothing matches.
    """
    if not checkpoint:
        raise UserError(
            "checkpoint= is missing: name a run's folder, a .ckpt file, an exported folder, "
            "a file of weights, timm:NAME, or latest."
        )
    if checkpoint.startswith(_TIMM):
        results = Path(runs_dir) / f"{checkpoint.replace(':', '_')}.results.json"
        return Checkpoint("timm", checkpoint, None, None, results)
    if checkpoint == "latest":
        return _of_path(_latest(Path(runs_dir)))
    path = Path(os.path.expandvars(checkpoint)).expanduser()
    for candidate in (path, Path(runs_dir) / checkpoint):
        inside = weights_file(candidate)
        if candidate.is_dir() and inside.is_file() and not _is_foreign(inside):
            results = candidate / "results.json"
            return Checkpoint("export", str(candidate), candidate, None, results)
        if inside.is_file():
            return _of_path(inside)
        if (last := Run(candidate).last).is_file():
            return _of_path(last)
        if (sequence := SequenceFolder(candidate)).exists():
            return _of_path(_result_of(sequence))
    raise UserError(
        f"checkpoint={checkpoint} is not a run, a file of weights or an exported folder."
    )


def open_backbone(
    checkpoint: Checkpoint, trust: Trust = (), layout: Layout | None = None
) -> Opened:
    """Open the backbone of a checkpoint (for a run, the teacher's) with its metadata.

    `layout` says whose weights are in a file if several programs use the same names.
    Code from outside dino_lite is imported only from packages that `trust` names.
    """
    if checkpoint.path is None:
        return open_timm(checkpoint.name.removeprefix(_TIMM))
    if checkpoint.run is not None:
        return _open_run(checkpoint.path, checkpoint.run, trust)
    if checkpoint.kind == "export":
        return open_export(checkpoint.path, trust)
    return open_weights(checkpoint.path, layout=layout)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint's tensors and plain values; never unpickles other objects."""
    try:
        content, others = load_inert(path, str(path))
        if others:
            raise UserError(
                f"{path} holds objects of {', '.join([*others][:3])}, which no checkpoint of "
                "dino_lite does, and which are not read without running code."
            )
        assert all(isinstance(value, Tensor) for value in content["state_dict"].values())
        assert isinstance(content["global_step"], int)
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"{path} is damaged or not a checkpoint of dino_lite ({type(error).__name__}): use "
            "best.ckpt next to it, or delete it to restart the run from scratch."
        ) from error
    return dict(content)


def save_backbone(
    file: Path, backbone: Backbone, step: int, heads: dict[str, Tensor] | None = None
) -> None:
    """Write a backbone, with weights of `heads` by the teacher's names, as a checkpoint of the run
    in whose folder `file` lies, atomically: its spec, its weights named as the teacher's, and the
    step. Raises UserError.
    """
    weights = {f"method.{_BACKBONE}{name}": each for name, each in backbone.state_dict().items()}
    weights |= {f"method.{name}": value for name, value in (heads or {}).items()}
    content = {"spec": backbone.stored_spec(), "state_dict": weights, "global_step": step}
    part = file.with_name(f".{file.name}.part")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(content, part)
        part.replace(file)
    except (OSError, RuntimeError) as error:
        part.unlink(missing_ok=True)
        raise UserError(f"{file} cannot be written ({error}): free disk space.") from error


def student_backbone(weights: dict[str, Tensor], config: Config, name: str) -> Backbone:
    """The average of a student, of the weights of `methods.distillation`."""
    prefix = f"teachers.ema.module.{name}.backbone."
    backbone = fresh_backbone(config)
    own = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
    backbone.load_state_dict(own)
    return backbone


def method_weights(content: dict[str, Any]) -> dict[str, Tensor]:
    """The state dict of the method, from the content returned by `read_checkpoint`."""
    return {name.removeprefix("method."): value for name, value in content["state_dict"].items()}


def heads_in(run: Run) -> dict[str, Tensor]:
    """The weights of the teacher's heads in the last checkpoint of a run, by their names there."""
    weights = method_weights(read_checkpoint(run.last))
    return {
        name: value
        for name, value in weights.items()
        if name.startswith(_TEACHER) and not name.startswith(_BACKBONE)
    }


def _below(prefix: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): v for n, v in weights.items() if n.startswith(prefix)}


def _latest(runs_dir: Path) -> Path:
    """The newest checkpoint of a run, or result of a finished sequence."""
    found = [*runs_dir.glob("*/checkpoints/last.ckpt")]
    for file in runs_dir.glob("*/sequence.json"):
        with suppress(UserError):  # damaged
            if (sequence := SequenceFolder(file.parent)).is_finished():
                found.append(_result_of(sequence))
    if not found:
        raise UserError(
            f"checkpoint=latest: {runs_dir} contains no run with a checkpoint; start one with "
            "dino-lite pretrain."
        )
    return max(found, key=lambda path: path.stat().st_mtime)


def _result_of(sequence: SequenceFolder) -> Path:
    result = sequence.result()
    if result is None:
        first = sequence.folder / sequence.read()["stages"][0]["name"]
        raise UserError(
            f"{sequence.folder} has no finished stage yet: run its command again, or name "
            f"{first}, the stage in training."
        )
    if not result.is_file():
        raise UserError(f"{sequence.folder}: its result {result} is missing: restore it.")
    return result


def _of_path(file: Path) -> Checkpoint:
    """The checkpoint in a file: of kind "run" if it is in the checkpoints folder of a run."""
    run = Run(file.parent.parent)
    if file.parent == run.checkpoints and run.config_file.is_file():
        return Checkpoint("run", str(file), file, run, run.results_file)
    results = file.with_name(file_name(file.name.replace(":", "_"), ".results.json"))
    return Checkpoint("file", str(file), file, None, results)


def _is_foreign(inside: Path) -> bool:
    """Whether the folder of a weights file was written by timm or Hugging Face."""
    about = read_about(inside)
    return inside.suffix == ".bin" or any(
        key in about for key in ("architecture", "architectures", "model_type")
    )


def _open_run(file: Path, run: Run, trust: Trust) -> Opened:
    config = current(load(run.config_file))
    nodes = [config.get(name) for name in ("backbone", "method", "adapter")]
    demand_trust(targets(nodes), trust, run.config_file)
    content = read_checkpoint(file)
    size, normalize = config["augment"]["global_size"], config["normalize"]
    try:
        backbone = _backbone_in(content, config, trust).float().eval()
    except RuntimeError as error:
        raise UserError(
            f"{file} does not match {run.config_file}: keep checkpoints in the folder of their run."
        ) from error
    own = backbone.state_dict()
    refuse_unsound(own, own, str(file))
    return Opened(
        backbone=backbone,
        preprocessing=Preprocessing(
            (size, size), tuple(normalize["mean"]), tuple(normalize["std"])
        ),
        card={"run": title_of(run), "steps": int(content["global_step"]), "config": config},
        data=own_collection(config["data"]),
    )


def _backbone_in(content: dict[str, Any], config: Config, trust: Trust) -> Backbone:
    """The backbone in a run's checkpoint: of its method, or alone (`save_backbone`)."""
    weights = method_weights(content)
    if "spec" in content:
        backbone = build_backbone(content["spec"], trust)
        backbone.load_state_dict(_below(_BACKBONE, weights))
        return backbone
    if config.get("students"):  # without their teacher, whose file need not be there
        name, node = next(iter(config["students"].items()))
        return student_backbone(weights, config | {"backbone": node}, name)
    method = fresh_method(config)
    method.load_state_dict(weights)
    return method.export_backbone()
