"""What `checkpoint=` names: how it is found, and opened as a backbone with its data. Weights that
somebody else made are opened too (backbones/weights.py).
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from dino_lite.backbones.build import Trust, check_spec, is_trusted, untrusted
from dino_lite.backbones.files import read_about, weights_file
from dino_lite.backbones.vit import ViT
from dino_lite.backbones.weights import (
    Opened,
    fit_positions,
    load_pretrained,
    open_timm,
    open_weights,
)
from dino_lite.config import Config, instantiate, load, locate, targets
from dino_lite.contracts import Backbone, Splits, UserError
from dino_lite.data.facts import first_readable
from dino_lite.formats.safetensors import load_backbone, read_config
from dino_lite.methods.method import Method
from dino_lite.runs import Run

_TIMM = "timm:"
# Of a run that begins with another's weights: what is not taken over, of weights and of settings.
_NOT_BEGUN_WITH = ("step", "teachers.gram.")
_OF_THE_NEW_RUN = ("image_size", "drop_path", "drop_path_by", "drop_path_uniform", "pretrained")
_HEADS = ("head", "patch_head", "centering", "center_momentum", "masking")


def find_checkpoint(checkpoint: str | None, runs_dir: str | Path) -> Path:
    """The file or exported folder that `checkpoint=` names: a run, a .ckpt file, an export, a file
    or folder of weights somebody else made, or "latest". "timm:NAME" is given back below
    `runs_dir`, where its results are kept.
    """
    if not checkpoint:
        raise UserError(
            "checkpoint= is missing: name a run's folder, a .ckpt file, an exported folder, "
            "a file of weights, timm:NAME, or latest."
        )
    if checkpoint.startswith(_TIMM):
        return Path(runs_dir) / checkpoint
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
        inside = weights_file(candidate)
        if inside.is_file():
            return inside if _is_foreign(inside) else candidate
        if (candidate / "checkpoints" / "last.ckpt").is_file():
            return candidate / "checkpoints" / "last.ckpt"
    raise UserError(
        f"checkpoint={checkpoint}: this is no run, no file of weights and no exported folder."
    )


def _is_foreign(inside: Path) -> bool:
    """Whether the folder that a file of weights lies in is timm's or Hugging Face's."""
    about = read_about(inside)
    return inside.suffix == ".bin" or any(
        key in about for key in ("architecture", "architectures", "model_type")
    )


def run_of(checkpoint: Path) -> Run | None:
    """The run a checkpoint file belongs to; None for all else."""
    run = Run(checkpoint.parent.parent)
    inside = checkpoint.parent == run.checkpoints and checkpoint.is_file()
    return run if inside and run.config_file.is_file() else None


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


def demand_trust(names: Iterable[str], trust: Trust, where: str | Path) -> None:
    """Refuse targets of a saved configuration that are code neither of dino_lite nor of packages
    that `trust` names. None of that code is imported.
    """
    for target in names:
        ours = target.startswith("dino_lite.") and getattr(locate(target), "__module__", None)
        if not is_trusted(target, trust) and not str(ours).startswith("dino_lite."):
            raise untrusted(str(where), target)


def open_backbone(checkpoint: Path, trust: Trust = ()) -> tuple[Backbone, Config]:
    """The backbone of a checkpoint (the teacher's), of an export, or of weights somebody else made,
    in eval mode, and what is known of it.

    Known are in_chans, image_size, mean, std, card (plain JSON: what trained it), data (its run's
    data configuration or None), and of somebody else's weights `told`: sentences on what fitted.
    Code of other packages is imported only from those that `trust` names.
    """
    if checkpoint.is_dir():
        about = read_config(checkpoint)
        return load_backbone(checkpoint, trust), about | {"data": None}
    run = run_of(checkpoint)
    if run is None:
        name = checkpoint.name
        timms = name.startswith(_TIMM)
        return _about(name, *(open_timm(name[len(_TIMM) :]) if timms else open_weights(checkpoint)))
    config = load(run.config_file)
    demand_trust(targets([config["backbone"], config["method"]]), trust, run.config_file)
    content = read_checkpoint(checkpoint)
    network = {key: value for key, value in config["backbone"].items() if key != "pretrained"}
    method = build_method(config | {"backbone": network, "checkpoint": None})
    weights = _weights_of_method(content)
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


def _about(name: str, backbone: Backbone, opened: Opened) -> tuple[Backbone, Config]:
    """Somebody else's backbone in `open_backbone`'s words."""
    return backbone, {
        "in_chans": backbone.in_chans,
        "image_size": opened.image_size,
        "mean": list(opened.mean),
        "std": list(opened.std),
        "data": None,
        "card": {"weights": name, "layout": opened.layout},
        "told": opened.sentences(),
    }


def asked_data(config: Config, checkpoint: Path, about: Config) -> Config:
    """The data configuration that was asked for, or where none was the run's own."""
    asked: Config = config["data"]
    if asked.get("root") is None and asked["_target_"].endswith(".open_auto"):
        if about["data"] is None:
            raise UserError(
                f"{checkpoint} is no run and knows no data: give data.root=, or data=shapes."
            )
        demand_trust(targets(about["data"]), config.get("trust"), checkpoint)
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
    """Where results about a checkpoint are kept: its run's results.json, an export's own, or one
    beside a file of weights that is called after it.
    """
    run = run_of(checkpoint)
    if run is not None:
        return run.results_file
    if checkpoint.is_dir():
        return checkpoint / "results.json"
    return checkpoint.with_name(f"{checkpoint.name.replace(':', '_')}.results.json")


def begin_config(config: Config) -> Config:
    """`config` with the backbone, heads, centering and masking of the run that `checkpoint` names,
    if it names one: they must fit, so nobody has to say them again. `trust` is read here and left
    out of what comes back: it is neither saved nor hashed.
    """
    config = dict(config)
    trust = config.pop("trust", None)
    if not config.get("checkpoint"):
        if (config["method"].get("gram") or {}).get("start_step") == 0:
            raise UserError(
                "method.gram.start_step=0 without checkpoint=: patches would be anchored to a "
                "network that has learned nothing; name the run to begin with, or start later."
            )
        return config
    run = _run_to_begin_with(config["checkpoint"], config["runs_dir"])[0]
    before = load(run.config_file)
    if before["method"]["_target_"] != config["method"]["_target_"]:
        raise UserError(
            f"checkpoint={config['checkpoint']} is a run of {before['method']['_target_']}: choose "
            "its method, as method=dinov2."
        )
    new, old = config["backbone"], before["backbone"]
    own = {key: new[key] for key in _OF_THE_NEW_RUN if key in new and key in old}
    method = {key: before["method"][key] for key in _HEADS if key in before["method"]}
    theirs = {*targets([old, method])} - {*targets(config)}  # the latter the user named
    demand_trust(theirs, trust, run.config_file)
    return config | {
        "backbone": old | own,
        "method": config["method"] | method,
    }


def build_method(config: Config) -> Method:
    """The method of a planned configuration: fresh weights drawn from its seed, or those of the run
    that `checkpoint` names.
    """
    torch.manual_seed(int(config["seed"]))
    make, network = instantiate(config["method"]), dict(config["backbone"])
    pretrained = network.pop("pretrained", None)
    backbone = check_spec(instantiate(network))
    if pretrained:
        load_pretrained(backbone, pretrained)
    method = make(backbone=backbone)
    assert isinstance(method, Method)
    if config.get("checkpoint"):
        _begin_with(method, config["checkpoint"], config["runs_dir"])
    return method.double() if str(config["trainer"]["precision"]) == "64" else method


def _run_to_begin_with(asked: str, runs_dir: str) -> tuple[Run, Path]:
    """The run that `checkpoint=` names, and its checkpoint."""
    if asked == "latest":
        raise UserError(
            "checkpoint=latest: name the run to begin with; when this one is resumed, it is the "
            "latest itself."
        )
    file = find_checkpoint(asked, runs_dir)
    run = run_of(file)
    if run is None:
        raise UserError(
            f"checkpoint={asked}: pretraining goes on from a run of dino_lite; to begin with the "
            f"weights of a backbone alone set backbone.pretrained={asked}."
        )
    return run, file


def _begin_with(method: Method, asked: str, runs_dir: str) -> None:
    """Student, heads, teacher and centers of an earlier run; the count of steps begins anew.

    Crops may be of another size: positions are resampled. A Gram teacher is made of the teacher.
    """
    _, file = _run_to_begin_with(asked, runs_dir)
    weights, own = _weights_of_method(read_checkpoint(file)), method.state_dict()
    for name, value in weights.items():
        part, _, last = name.rpartition(".")
        network = method.get_submodule(part) if last == "pos_embed" and name in own else None
        if isinstance(network, ViT):
            weights[name] = fit_positions(value, network)
    weights = {n: value for n, value in weights.items() if not n.startswith(_NOT_BEGUN_WITH)}
    own = {n: value for n, value in own.items() if not n.startswith(_NOT_BEGUN_WITH)}
    wrong = [n for n in own if n not in weights or own[n].shape != weights[n].shape]
    if wrong or weights.keys() - own.keys():
        name = (wrong or sorted(weights.keys() - own.keys()))[0]
        raise UserError(
            f"checkpoint={asked} does not fit this run, {name} being the first that differs: leave "
            "out what changes backbone or heads."
        )
    method.load_state_dict(weights, strict=False)
    method.begin()


def _weights_of_method(content: dict[str, Any]) -> dict[str, Any]:
    return {n.removeprefix("method."): value for n, value in content["state_dict"].items()}
