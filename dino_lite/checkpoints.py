"""What `checkpoint=` names: how it is found, and opened as a backbone with its data."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from dino_lite.config import Config, instantiate, load, put
from dino_lite.contracts import Splits, UserError
from dino_lite.data.facts import first_readable
from dino_lite.formats.safetensors import load_backbone, read_config
from dino_lite.methods.method import Method
from dino_lite.runs import Run


def find_checkpoint(checkpoint: str | None, runs_dir: str | Path) -> Path:
    """The .ckpt file or exported folder that `checkpoint=` names: a run, a file, an export, or
    "latest".
    """
    if not checkpoint:
        raise UserError(
            "checkpoint= is missing: name a run's folder, a .ckpt file, an exported folder, "
            "or latest."
        )
    if checkpoint == "latest":
        runs = sorted(
            Path(runs_dir).glob("*/checkpoints/last.ckpt"), key=lambda p: p.stat().st_mtime
        )
        if not runs:
            raise UserError(
                f"checkpoint=latest: there is no finished or running run in {runs_dir}; run "
                "dino-lite pretrain."
            )
        return runs[-1]
    path = Path(os.path.expandvars(checkpoint)).expanduser()
    for candidate in (path, Path(runs_dir) / checkpoint):
        if candidate.is_file():
            return candidate
        if (candidate / "model.safetensors").is_file():
            return candidate
        if (candidate / "checkpoints" / "last.ckpt").is_file():
            return candidate / "checkpoints" / "last.ckpt"
    raise UserError(
        f"checkpoint={checkpoint}: this is no run, no .ckpt file and no exported folder."
    )


def run_of(checkpoint: Path) -> Run | None:
    """The run a checkpoint file belongs to; None for an export."""
    folder = checkpoint.parent.parent
    return Run(folder) if checkpoint.is_file() and (folder / "config.yaml").is_file() else None


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint's tensors and plain values; never unpickles anything else."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        assert isinstance(content["state_dict"], dict)
    except Exception as error:
        raise UserError(
            f"{path} is damaged or no checkpoint of dino_lite ({type(error).__name__}): "
            "use best.ckpt beside it, or delete it to start the run anew."
        ) from error
    return dict(content)


def open_backbone(checkpoint: Path) -> tuple[Any, Config]:
    """The backbone of a checkpoint (the teacher's) or of an export, in eval mode, and what is known
    of it.

    Known are in_chans, image_size, mean, std, card (plain JSON: what trained it) and data (its
    run's data configuration or None).
    """
    if checkpoint.is_dir():
        about = read_config(checkpoint)
        return load_backbone(checkpoint), about | {"data": None}
    run = run_of(checkpoint)
    if run is None:
        raise UserError(
            f"{checkpoint}: config.yaml of its run is not two folders up; keep checkpoints in "
            "their run."
        )
    config = load(run.config_file)
    content = read_checkpoint(checkpoint)
    method = build_method(put(config, "backbone.pretrained", None))
    weights = {n.removeprefix("method."): value for n, value in content["state_dict"].items()}
    try:
        method.load_state_dict(weights)
    except RuntimeError as error:
        raise UserError(
            f"{checkpoint} does not fit {run.config_file}: keep checkpoints in their own run."
        ) from error
    about = {
        "in_chans": config["backbone"]["in_chans"],
        "image_size": config["augment"]["global_size"],
        "mean": config["normalize"]["mean"],
        "std": config["normalize"]["std"],
        "data": config["data"],
        "card": {"run": run.folder.name, "steps": int(content["global_step"]), "config": config},
    }
    return method.export_backbone().float().eval(), about


def asked_data(config: Config, checkpoint: Path, about: Config) -> Config:
    """The data configuration that was asked for, or where none was the run's own."""
    asked: Config = config["data"]
    if asked.get("root") is None and asked["_target_"].endswith(".open_auto"):
        if about["data"] is None:
            raise UserError(
                f"{checkpoint} is an export and knows no data: give data.root=, or data=shapes."
            )
        return dict(about["data"])
    if asked.get("channels") == 3:  # what stands there where nobody asked
        return asked | {"channels": about["in_chans"]}
    return asked


def open_data(asked: Config, about: Config) -> Splits:
    """The data, in the backbone's channels."""
    splits: Splits = instantiate(asked)
    found = first_readable(splits.train).shape[2]
    if found != about["in_chans"]:
        raise UserError(
            f"{splits.name} has images of {found} channels, but the backbone takes "
            f"{about['in_chans']}: leave data.channels out, or choose other data."
        )
    return splits


def results_file(checkpoint: Path) -> Path:
    """Where results about a checkpoint are kept: its run's results.json, or an export's own."""
    run = run_of(checkpoint)
    return (
        run.results_file
        if run
        else (checkpoint if checkpoint.is_dir() else checkpoint.parent) / "results.json"
    )


def build_method(config: Config) -> Method:
    """The method of a planned configuration, fresh weights drawn from its seed."""
    torch.manual_seed(int(config["seed"]))
    method = instantiate(config["method"])(backbone=instantiate(config["backbone"]))
    assert isinstance(method, Method)
    return method.double() if str(config["trainer"]["precision"]) == "64" else method
