"""ResNets and ConvNeXts of others: how their names become ours, and the spec that shapes tell."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dino_lite.backbones.convnet import ConvNet
from dino_lite.backbones.named import timm_names
from dino_lite.contracts import UserError
from dino_lite.formats.owner import BY_FILE, Pairs, Read, Tensors

STAGES = range(4)
CONVNEXT, RESNET = "stages.0.blocks.0.conv_dw.weight", "stages.0.0.conv1.weight"
_PLAIN = re.compile(r"resnet\d+|convnext(v2)?_\w+")  # names without other pooling or attention
_SMOOTHED = re.compile(r"(blur|aa)(?=\d)")  # in names of ResNets with anti-aliasing
EPS = 1e-6  # of a ConvNeXt's norms, unless told otherwise
_COUNTER = "num_batches_tracked"
# Width of the first stage and depths of timm's ConvNeXts; later stages are twice as wide each.
_CONVNEXTS: dict[tuple[int, tuple[int, ...]], str] = {
    (40, (2, 2, 6, 2)): "atto",
    (48, (2, 2, 6, 2)): "femto",
    (64, (2, 2, 6, 2)): "pico",
    (80, (2, 2, 8, 2)): "nano",
    (96, (3, 3, 9, 3)): "tiny",
    (96, (3, 3, 27, 3)): "small",
    (128, (3, 3, 27, 3)): "base",
    (192, (3, 3, 27, 3)): "large",
    (256, (3, 3, 27, 3)): "xlarge",
    (352, (3, 3, 27, 3)): "huge",
    (384, (3, 4, 30, 3)): "xxlarge",
}
_SETTINGS = (("output_stride", "patch_size"), ("norm_eps", "norm_eps"))  # timm's and ours
# Keywords of timm's models that shapes tell, or that do not change the tokens.
_TOLD_BY_SHAPES = (
    *("dims", "depths", "layers", "channels", "block", "in_chans", "conv_mlp", "use_grn"),
    *("stem_type", "stem_width", "patch_size", "kernel_sizes", "ls_init_value", "conv_bias"),
    *("cardinality", "base_width", "avg_down", "num_classes", "head_hidden_size", "global_pool"),
    *("head_init_scale", "drop_rate", "drop_path_rate", "zero_init_last", "head_norm_first"),
)


class Names(NamedTuple):
    """How one program names the weights of a convnet, as pairs (theirs, ours): `begins` replaces
    the beginning of a name, then `parts` a part of it; in both, the first pair that fits.
    """

    begins: Pairs
    parts: Pairs = ()

    def read(self, own: Tensors) -> tuple[Tensors, list[str]]:
        """Weights by our names, and their names of what is not part of the backbone. Convolutions
        of unknown names are kept, so that loading them fails.
        """
        weights: Tensors = {}
        unused = []
        for name, value in own.items():
            ours = _replaced(name, self.begins, self.parts)
            if ours is None and value.ndim != 4:
                unused.append(name)
            else:
                weights[ours or name] = value
        return weights, unused

    def write(self, weights: Tensors) -> Tensors:
        """Weights by their names, without what they do not have, on the CPU."""
        begins, parts = ([(ours, theirs) for theirs, ours in pairs] for pairs in self)
        found = {_replaced(name, begins, parts): value for name, value in weights.items()}
        return {
            name: value.detach().cpu().contiguous()
            for name, value in found.items()
            if name is not None
        }


def _replaced(name: str, begins: Any, parts: Any) -> str | None:
    """`name` after one pair of each kind; None if no beginning fits."""
    for old, new in begins:
        if name.startswith(old):
            name = new + name.removeprefix(old)
            break
    else:
        return None
    old, new = next(((old, new) for old, new in parts if old in name), ("", ""))
    return name.replace(old, new, 1)


def reads(owner: str, why: str, names: Names) -> Callable[[Tensors, dict[str, Any]], Read]:
    """A reader for the weights that `owner` names so."""

    def read(own: Tensors, about: dict[str, Any]) -> Read:
        weights, unused = names.read(own)
        return Read(owner, why, weights, unused, {"kind": ConvNet.kind})

    return read


def stem_of(weights: Tensors) -> str | None:
    """Our name of the only convolution that depends on image channels; None if there is none."""
    stems = (n for n in weights if n.startswith("stem.") and weights[n].ndim == 4)
    return min(stems, default=None)


def shaped(weights: Tensors, own: Tensors) -> Tensors:
    """`weights` in the shapes of `own` where these differ by dimensions of size 1, as those of
    linear layers and of convolutions do. Counters of batches, which older files lack, are zero.
    """
    found = {
        name: value.reshape(own[name].shape)
        if name in own and value.shape != own[name].shape and _shape(value) == _shape(own[name])
        else value
        for name, value in weights.items()
    }
    counters = {n: torch.zeros((), dtype=v.dtype) for n, v in own.items() if n.endswith(_COUNTER)}
    return found | {name: zero for name, zero in counters.items() if name not in found}


def convnet_spec(read: Read, about: dict[str, Any], asked: str) -> dict[str, Any]:
    """The spec of the convnet whose weights were read, from their shapes and from `about`: keys of
    timm's config.json. `asked` is the prefix of messages. Raises UserError if it is none of timm's
    ResNets and ConvNeXts, with any widths and depths.
    """
    try:
        return _matching(read, about)
    except UserError as error:
        raise UserError(f"{asked}: {error}") from error


def _matching(read: Read, about: dict[str, Any]) -> dict[str, Any]:
    weights, odd = read.weights, "lacks a stem or one of four stages"
    depths, widths = stages(weights)
    stem, name, sizes = stem_of(weights), "", {"widths": widths, "depths": depths}
    if stem is not None and len(depths) == len(STAGES) and all(widths):
        common = {
            **{"patch_size": 32, "in_chans": weights[stem].shape[1]},
            **read.spec,
            **_told(about),
            "norm": "layer" if CONVNEXT in weights else "batch",
        }
        names = _names(weights, depths, widths, about)
        given: list[dict[str, Any]] = [{"name": name} for name in names]
        told = [given[0] | sizes] if "architecture" in about else []
        for spec in (given[0], *told, *given[1:], given[-1] | sizes):
            if (other := difference(common | spec, weights)) is None:
                return common | spec
            odd, name = other, names[-1]
    like = f" for timm's {name} of that size" if name else ""
    raise UserError(
        f"it has the names of a {read.owner} with widths={widths} and depths={depths}, but {odd}"
        f"{like}: only timm's ResNets with batch normalization and its ConvNeXts can be opened; if "
        'it is one, write {"architecture": ITS NAME} into the JSON file beside it.'
    )


def _told(about: dict[str, Any]) -> dict[str, Any]:
    """What timm's model_args say beyond shapes. Raises UserError if we have no such setting."""
    args = about.get("model_args")
    told = dict(args) if isinstance(args, dict) else {}
    spec = {ours: told.pop(theirs, None) for theirs, ours in _SETTINGS}
    other = [f"{key}={value}" for key, value in told.items() if key not in _TOLD_BY_SHAPES]
    if other or told.get("global_pool", "avg") != "avg":
        raise UserError(
            "model_args in the JSON file beside it have "
            f"{', '.join(other) or 'another global_pool than avg'}, which a backbone of dino_lite "
            "cannot have: use it with timm."
        )
    return {key: value for key, value in spec.items() if value is not None}


def stages(weights: Tensors) -> tuple[list[int], list[int]]:
    """Numbers of blocks and output channels (0 if unknown) of each stage."""
    found = re.compile(r"stages\.(\d+)\.(?:blocks\.)?(\d+)\.")
    blocks = {match.groups() for name in weights if (match := found.match(name))}
    stages = sorted({int(stage) for stage, _ in blocks})
    depths = [sum(int(stage) == i for stage, _ in blocks) for i in stages]
    last = ("blocks.0.conv_dw.weight", "0.conv3.weight", "0.conv2.weight")
    names = [[f"stages.{i}.{each}" for each in last] for i in stages]
    firsts = [next((weights[n] for n in each if n in weights), None) for each in names]
    return depths, [0 if first is None else first.shape[0] for first in firsts]


def _names(
    weights: Tensors, depths: list[int], widths: list[int], about: dict[str, Any]
) -> list[str]:
    """timm's names that the network may have, the last of which takes any widths and depths."""
    if "architecture" in about:
        name = str(about["architecture"]).partition(".")[0]
        if name not in timm_names():
            raise UserError(
                f"the JSON file beside it has architecture={name}, which timm does not have: "
                "name its network, or remove the key."
            )
        if about.get("told_by") != BY_FILE:
            return [name]
        others = {key: value for key, value in about.items() if key != "architecture"}
        return [name, *_names(weights, depths, widths, others)]
    if CONVNEXT in weights:
        grn = any(name.endswith(".mlp.grn.weight") for name in weights)
        family = "convnextv2" if grn else "convnext"
        size = _CONVNEXTS.get((widths[0], tuple(depths)))
        known = timm_names("convnext")
        named = [n for n in (f"{family}_{size}", f"{family}_{size}_ols") if n in known]
        return [*named, f"{family}_tiny"]
    bottleneck = "stages.0.0.conv3.weight" in weights
    layers = 2 + sum(depths) * (3 if bottleneck else 2)
    number = re.compile(rf"(?<!\d){layers}(?!\d)")
    named = [n for n in timm_names("resnet") if number.search(n)]
    named.sort(key=lambda name: (len(name), name))
    return [*named, "resnet50" if bottleneck else "resnet18"]


def demand_plain(backbone: ConvNet, base: str, program: str) -> dict[str, list[int]]:
    """Widths and depths of a convnet that is timm's `base` but for these. Raises UserError if it is
    another, which `program` does not have.
    """
    weights, spec = backbone.state_dict(), backbone.spec
    depths, widths = stages(weights)
    usual = {"patch_size": 32, "fields": 0, "in_chans": spec["in_chans"]}
    usual |= {"norm": "batch" if base.startswith("resnet") else "layer"}
    same = _PLAIN.fullmatch(spec["name"]) and spec == spec | usual and "norm_eps" not in spec
    sizes = {"widths": widths, "depths": depths}
    if not same or difference(usual | {"name": base} | sizes, weights) is not None:
        raise UserError(
            f"{program} has no network like {spec['name']} with these settings: export it as "
            "format=onnx or format=torch_export."
        )
    return sizes


def refuse_other(backbone: ConvNet, about: dict[str, Any], asked: str) -> None:
    """Raise UserError if `about` says an architecture that computes something else than `backbone`
    with weights of the same shapes.
    """
    if not isinstance(told := about.get("architecture"), str):
        return
    name = told.partition(".")[0]
    keywords = {key: backbone.spec[key] for key in ("patch_size", "in_chans", "norm")}
    theirs = None
    with suppress(UserError), torch.device("meta"), torch.random.fork_rng(devices=[]):
        theirs = _operations(ConvNet(name, **keywords))
    if theirs != _operations(backbone):
        by = about.get("told_by", "the JSON beside it")
        raise UserError(
            f"{asked} has weights of {name}, as {by} says, and the backbone is "
            f"{backbone.spec['name']}, which computes something else with them: "
            f"choose backbone={name}."
        )


def _operations(backbone: ConvNet) -> set[str]:
    """What shapes of weights do not tell: kinds of activations and of pooling."""
    bare = (part for part in backbone.modules() if not [*part.parameters(), *part.children()])
    return {type(part).__name__ for part in bare} - {"DropPath", "Dropout", "Identity"}


def doubted(read: Read, name: str, about: dict[str, Any]) -> Read:
    """`read` with a clause on timm's networks whose weights have the shapes of those of its network
    `name`, if nothing tells them apart.
    """
    base = _SMOOTHED.sub("", name)
    twins = [each for each in timm_names("resnet") if _SMOOTHED.sub("", each) == base]
    if "architecture" in about or len(twins) < 2:
        return read
    others = " and ".join(each for each in twins if each != name)
    return read._replace(
        why=f"{read.why}, and is taken for timm's {name}; {others} of the same shapes filter what "
        'they subsample: of such a network write {"architecture": NAME} into NAME.json next to the '
        "file"
    )


def difference(spec: dict[str, Any], weights: Tensors) -> str | None:
    """How the weights first differ from those of the convnet `spec`; None if they fit."""
    keywords = {key: value for key, value in spec.items() if key != "kind"}
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        own = ConvNet(**keywords).state_dict()
    theirs, ours = (
        {name: _shape(value) for name, value in each.items() if not name.endswith(_COUNTER)}
        for each in (weights, own)
    )
    for name in [*ours, *theirs]:
        if ours.get(name) != theirs.get(name):
            if name not in theirs or name not in ours:
                return f"{'has' if name in theirs else 'lacks'} {name}"
            return f"{name} is {tuple(weights[name].shape)} and not {tuple(own[name].shape)}"
    return None


def _shape(value: Tensor) -> list[int]:
    """Without dimensions of size 1."""
    return [size for size in value.shape if size > 1]
