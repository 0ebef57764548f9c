"""Initial weights of a run: fresh ones, those of a pretrained backbone, or those of another run."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from dino_lite.backbones.compact import Compact
from dino_lite.backbones.convnet import ConvNet
from dino_lite.backbones.spec import checked_spec
from dino_lite.backbones.vit import ViT
from dino_lite.config import Config, compose, config_dir, leaves, load
from dino_lite.contracts import UserError
from dino_lite.formats.sound import refuse_unsound
from dino_lite.formats.tensors import read_about, weights_file
from dino_lite.formats.weights import fit_positions
from dino_lite.methods.method import Method
from dino_lite.runs.checkpoint import find_checkpoint, method_weights, read_checkpoint
from dino_lite.runs.fresh import fresh_method
from dino_lite.runs.identity import ABSENT, default_of
from dino_lite.runs.old_names import current
from dino_lite.runs.run import Run
from dino_lite.runs.trust import demand_trust, targets
from dino_lite.settings.validate import locate_class, shown

# Settings of the backbone that need not match the weights of the earlier run.
_OF_THE_NEW_RUN = ("image_size", "drop_path", "drop_path_by", "drop_path_uniform", "pretrained")


def begin_config(config: Config) -> Config:
    """If `checkpoint` names a run, replace the settings that must match its weights: those of the
    backbone, and those that the method inherits. Raises UserError if others are asked for. If
    `backbone.pretrained` alone is given and is the export of a convnet, that is the backbone.
    `trust` is used here and removed from the result: it is neither saved nor hashed.
    """
    config = dict(config)
    trust = config.pop("trust", None)
    target = config["method"]["_target_"]
    method = locate_class(config["method"], "method", Method)
    config["backbone"] = _as_exported(config["backbone"])
    if not config.get("checkpoint"):
        if (why := method.requires_weights(config["method"])) is not None:
            raise UserError(f"{why}; name the run to start from as checkpoint=, or start later.")
        return config
    run = _run_to_begin_with(config["checkpoint"], config["runs_dir"])[0]
    before = current(load(run.config_file))
    if before["method"]["_target_"] != target:  # compared by name: importing it would run its code
        raise UserError(
            f"checkpoint={config['checkpoint']} is a run of {before['method']['_target_']}: choose "
            "the same method, as in method=dinov2."
        )
    new, old = config["backbone"], before["backbone"]
    own = {key: new[key] for key in _OF_THE_NEW_RUN if key in new and key in old}
    inherited = {k: before["method"][k] for k in method.inherits if k in before["method"]}
    theirs = {*targets([old, inherited])} - {*targets(config)}  # the user named the latter
    demand_trust(theirs, trust, run.config_file)
    kept = {"backbone": old | own, "method": inherited}
    _refuse_others(config, kept, before.get("overrides") or [])
    return config | {"backbone": old | own, "method": config["method"] | inherited}


def _as_exported(backbone: Config) -> Config:
    """The convnet whose export `pretrained` names, if no other key of `backbone` was set."""
    folder, start = config_dir() / "backbone", backbone.get("pretrained")
    if not start or backbone | {"pretrained": None} != load(folder / "auto.yaml"):
        return backbone
    spec = checked_spec(read_about(weights_file(start)).get("spec") or {})
    while spec["kind"] == Compact.kind:
        spec = checked_spec(spec["whole"])
    if spec.get("kind") != ConvNet.kind:
        return backbone
    node = load(folder / "convnet.yaml") | {"pretrained": start}
    return node | {key: spec[key] for key in spec.keys() & node.keys() - {"in_chans"}}


def _refuse_others(config: Config, kept: Config, before: list[str]) -> None:
    """Raise UserError if the user asks for other values than those `kept` of the earlier run, by a
    key or by a choice that its command line, `before`, did not have.
    """
    inherited = {name: v for name, v in config["method"].items() if name in kept["method"]}
    new = dict(leaves({"backbone": config["backbone"], "method": inherited}))
    old = dict(leaves(kept))
    words = {
        w: w.partition("=")[0].partition("@")[0].lstrip("+~") for w in config.get("overrides") or ()
    }
    given = {k for k in new | old for node in words.values() if k == node or _is_below(k, node)}
    groups = {node for word, node in words.items() if word not in before and _is_group(node)}
    with suppress(UserError):  # of a choice outside conf/
        method = config.get("choices", {}).get("method")
        if groups and method:  # what they choose differs from the defaults beside this method
            bare = dict(leaves(compose("pretrain", [f"method={method}"])))
            given |= {key for key, value in new.items() if bare.get(key, ABSENT) != value}
    choices = [word for word, node in words.items() if node in groups - {"backbone"}]
    by = f" by {' '.join(choices)}" if choices else ""
    other: dict[str, str] = {}
    for key in sorted(given):
        value, its = (now.get(key, default_of(now, key)) for now in (new, old))
        if value not in ("auto", its) and not any(_is_below(key, above) for above in other):
            theirs = "the network's own" if its is None else shown(its)
            typed = any(key == node or key.startswith(f"{node}.") for node in words.values())
            other[key] = f"{key}={shown(value)}{'' if typed else by} (the run: {theirs})"
    if other.keys() & {"backbone._target_", "backbone.name"}:  # another network has other settings
        word = next((w for w in words if words[w] in ("backbone", "backbone.name")), None)
        word = word or f"backbone={_network(config['backbone'])}{by}"
        other = {key: text for key, text in other.items() if not key.startswith("backbone.")}
        other = {"backbone": f"{word} (the run: {_network(kept['backbone'])})"} | other
    if other:
        raise UserError(
            f"checkpoint={config['checkpoint']} keeps the backbone and heads of that run, which "
            f"differ from {', '.join(other.values())}: leave these settings out, give the run's "
            "values, or train without checkpoint=."
        )


def _network(node: Config) -> str:
    """What a backbone is called: its name, otherwise its class."""
    return str(node.get("name") or node["_target_"].rpartition(".")[2])


def _is_below(key: str, node: str) -> bool:
    """Whether the key of a setting lies below a node that is not a group."""
    return "." in node and key.startswith(f"{node}.")


def _is_group(node: str) -> bool:
    """Whether `node` is a group whose choices may set the backbone and the heads. Not `method`: the
    choice of the run is given again, which also names its default heads.
    """
    return node != "method" and (config_dir() / node).is_dir()


def build_method(config: Config) -> Method:
    """Build the method of a planned configuration with its initial weights."""
    method = fresh_method(config, config["backbone"].get("pretrained"))
    if config.get("checkpoint"):
        _begin_with(method, config["checkpoint"], config["runs_dir"])
    return method


def _run_to_begin_with(asked: str, runs_dir: str) -> tuple[Run, Path]:
    """The run that `checkpoint=` names, and its checkpoint file."""
    if asked == "latest":
        raise UserError(
            "checkpoint=latest: name the run to start from; once this run is resumed, it would be "
            "the latest itself."
        )
    checkpoint = find_checkpoint(asked, runs_dir)
    if checkpoint.run is None or checkpoint.path is None:
        raise UserError(
            f"checkpoint={asked} is not a run of dino_lite; to start from the weights of a "
            f"backbone, set backbone.pretrained={asked}."
        )
    return checkpoint.run, checkpoint.path


def _begin_with(method: Method, asked: str, runs_dir: str) -> None:
    """Load the weights of an earlier run; position embeddings are resampled if the grid differs."""
    _, file = _run_to_begin_with(asked, runs_dir)
    weights, own = method_weights(read_checkpoint(file)), method.state_dict()
    refuse_unsound(weights, f"checkpoint={asked}")
    for name, value in weights.items():
        part, _, last = name.rpartition(".")
        network = method.get_submodule(part) if last == "pos_embed" and name in own else None
        if isinstance(network, ViT):
            weights[name] = fit_positions(value, network)
    try:
        method.begin(weights)
    except UserError as error:
        raise UserError(f"checkpoint={asked} does not fit this run: {error}") from None
