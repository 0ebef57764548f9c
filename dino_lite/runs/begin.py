"""Initial weights of a run: fresh ones, those of a pretrained backbone, or those of another run."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from dino_lite.backbones.convnet import ConvNet
from dino_lite.backbones.rope import RoPEViT
from dino_lite.backbones.vit import ViT
from dino_lite.config import Config, compose, config_dir, leaves, load
from dino_lite.contracts import Trust, UserError
from dino_lite.formats.fit import fit_positions
from dino_lite.formats.grids import STEM, grid_of
from dino_lite.formats.sound import refuse_unsound
from dino_lite.formats.tensors import weights_file
from dino_lite.formats.weights import spec_in
from dino_lite.methods.method import Method
from dino_lite.runs.checkpoint import find_checkpoint, method_weights, read_checkpoint
from dino_lite.runs.fresh import fresh_method
from dino_lite.runs.identity import ABSENT, default_of
from dino_lite.runs.old_names import current
from dino_lite.runs.run import Run
from dino_lite.runs.teacher import open_teacher, teacher_config
from dino_lite.runs.trust import demand_trust, targets
from dino_lite.settings.validate import locate_class, shown

# Settings of the backbone that need not match the weights of the earlier run, or of a file.
_OF_THE_NEW_RUN = ("image_size", "drop_path", "drop_path_by", "drop_path_uniform", "pretrained")
_OF_NO_FILE = (
    *_OF_THE_NEW_RUN,
    "patch_size",
    "in_chans",
    "mask_token",
    "position_offset",
    "position_antialias",
)
# The file of conf/backbone whose settings a kind of backbone has, and its named sizes.
_CHOICES = {ViT.kind: "auto", RoPEViT.kind: "rope", ConvNet.kind: "convnet"}
_NAMED = {  # width, depth and heads
    (192, 12, 3): "vit_tiny",
    (384, 12, 6): "vit_small",
    (768, 12, 12): "vit_base",
    (1024, 24, 16): "vit_large",
}


def begin_config(config: Config) -> Config:
    """If `checkpoint` names a run, replace the settings that must match its weights: those of the
    backbone, and those that the method inherits. Raises UserError if others are asked for. If
    `backbone.pretrained` is given without an architecture, that of the file is the backbone's.
    `trust` is used here and removed from the result: it is neither saved nor hashed.
    """
    config = dict(config)
    trust = config.pop("trust", None)
    config = teacher_config(config)
    target = config["method"]["_target_"]
    method = locate_class(config["method"], "method", Method)
    config["backbone"] = _as_in_file(config["backbone"], trust)
    if not config.get("checkpoint"):
        begun = config["backbone"].get("pretrained")
        if not begun and (why := method.requires_weights(config["method"])) is not None:
            raise UserError(
                f"{why}; name the weights to start from by one of them, or start later."
            )
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


def _as_in_file(backbone: Config, trust: Trust) -> Config:
    """The backbone whose weights `pretrained` names, with what else was given, unless a setting of
    the architecture was.
    """
    start = backbone.get("pretrained")
    bare = [load(config_dir() / "backbone" / f"{name}.yaml") for name in ("auto", "rope")]
    usual = next((node for node in bare if node["_target_"] == backbone["_target_"]), {})
    given = {key: v for key, v in backbone.items() if usual.get(key, ABSENT) != v}
    if not start or given.keys() - {*_OF_NO_FILE}:
        return backbone
    run = Run(weights_file(start).parent.parent)
    if weights_file(start).parent == run.checkpoints and run.config_file.is_file():
        saved = current(load(run.config_file))["backbone"]
        demand_trust(targets([saved]), trust, run.config_file)
        follows = {key: "auto" for key in ("image_size", "in_chans") if key in saved}
        node: Config | None = saved | follows
    else:
        node = _node_of(spec_in(start) or {})
    other_family = usual is bare[1] and node and node["_target_"] != backbone["_target_"]
    if node is None or other_family:  # loading its weights will say what does not fit
        return backbone
    return node | {key: v for key, v in given.items() if key in node}


def _node_of(spec: Config) -> Config | None:
    """The settings of the backbone that `spec` describes; None if its kind has none here."""
    choice, sizes = _CHOICES.get(spec.get("kind", "")), ("embed_dim", "depth", "num_heads")
    if choice is None:
        return None
    folder = config_dir() / "backbone"
    left = {"kind", "image_size", "in_chans", "mask_token"}  # follow from the data and the method
    node = load(folder / f"{choice}.yaml")
    if choice == "convnet":  # where the spec does not say otherwise
        node |= {"widths": None, "depths": None, "patch_size": 32, "fields": 0}
    node |= {key: value for key, value in spec.items() if key not in left}
    found: tuple[Any, ...] = tuple(spec.get(key) for key in sizes)
    named = _NAMED.get(found)
    known = folder / f"{named}{'_dinov3' if choice == 'rope' else ''}.yaml"
    if named and spec["name"] in ("vit", "rope") and known.is_file():
        # By its name, so that the settings that suit it are chosen.
        node |= {"name": load(known)["name"], **dict.fromkeys(sizes)}
    elif choice != "convnet" and spec["name"] not in ("vit", "rope"):
        node |= {key: spec.get(key) for key in (*sizes, "init_values")}  # None: the named model's
    return node


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


def build_method(config: Config, trust: Trust = ()) -> Method:
    """Build the method of a planned configuration with its initial weights."""
    teacher = open_teacher(config, trust)
    method = fresh_method(config, config["backbone"].get("pretrained"), teacher)
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
    run, file = _run_to_begin_with(asked, runs_dir)
    about = {"image_size": current(load(run.config_file))["backbone"].get("image_size")}
    weights, own = method_weights(read_checkpoint(file)), method.state_dict()
    refuse_unsound(weights, own, f"checkpoint={asked}")
    for name, value in weights.items():
        part, _, last = name.rpartition(".")
        network = method.get_submodule(part) if last == "pos_embed" and name in own else None
        if isinstance(network, ViT):
            stem = weights[f"{part}.{STEM}"]
            grid = grid_of({"pos_embed": value, STEM: stem}, about)
            weights[name], said = fit_positions(value, network, grid)
            if said and said not in method.notes:
                method.notes += (said,)
    try:
        method.begin(weights)
    except UserError as error:
        raise UserError(f"checkpoint={asked} does not fit this run: {error}") from None
