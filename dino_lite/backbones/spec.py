"""Builds a backbone from its spec, and checks that a backbone's spec rebuilds it."""

from __future__ import annotations

import json
import math
import pkgutil
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch

from dino_lite.backbones.compact import Compact
from dino_lite.backbones.convnet import ConvNet
from dino_lite.backbones.rope import RoPEViT
from dino_lite.backbones.vit import ViT
from dino_lite.contracts import Backbone, Tokens, Trust, UserError
from dino_lite.settings.validate import parameters, shown, validated

_FAMILIES: dict[str, type[Backbone]] = {
    each.kind: each for each in (ViT, RoPEViT, ConvNet, Compact)
}
_SIZES = ("embed_dim", "patch_size", "in_chans", "num_blocks")
_LARGEST, _MOST_BLOCKS, _MOST_COMPACT = 2**20, 256, 8  # in a spec
_PLACES = {"device", "dtype"}  # keywords of timm's that no spec has


def build_backbone(spec: Any, trust: Trust = ()) -> Backbone:
    """The backbone that `spec` (a Backbone's `stored_spec`, plain JSON) describes, with fresh
    weights. A class of another package is imported only if `trust` names that package. Raises
    UserError, before anything is built, for a spec that no backbone stores.
    """
    keywords = checked_spec(spec)
    kind = keywords.pop("kind")
    family = _FAMILIES.get(kind)
    if family is Compact:
        keywords["whole"] = build_backbone(keywords["whole"], trust)
    return (family or _import(kind, trust))(**keywords)


def empty_backbone(spec: Any, trust: Trust = ()) -> Backbone:
    """As `build_backbone`, on the meta device if all its classes are ours, so that neither memory
    nor time is spent on weights; the random state is preserved.
    """
    inner = checked_spec(spec)
    while inner["kind"] == Compact.kind:
        inner = checked_spec(inner["whole"])
    place = torch.device("meta") if inner["kind"] in _FAMILIES else nullcontext()
    with torch.random.fork_rng(devices=[]), place:
        return build_backbone(spec, trust)


def checked_spec(spec: Any, depth: int = 0) -> dict[str, Any]:
    """`spec` with its kind. Raises UserError if it is not an object, or if one of our families has
    no such keyword, or does not store such a value.
    """
    if not isinstance(spec, Mapping) or not all(isinstance(key, str) for key in spec):
        raise UserError(f"the backbone's spec is {_short(spec)}, but must be a group of keywords.")
    told: dict[str, Any] = {"kind": ViT.kind} | dict(spec)
    kind = told["kind"]
    if not isinstance(kind, str) or kind not in _FAMILIES:
        return told | {"kind": str(kind)}
    keywords = {key: value for key, value in told.items() if key != "kind"}
    if kind == Compact.kind:
        if depth >= _MOST_COMPACT:
            raise UserError(f"the backbone's spec has more than {_MOST_COMPACT} compact in a row.")
        checked_spec(keywords.pop("whole", None), depth + 1)
    family: Any = _FAMILIES[kind]
    known = parameters(family).hints.keys() - _PLACES
    for key, value in keywords.items():
        many = isinstance(value, list) and len(value) <= _MOST_BLOCKS
        plain = all(map(_is_plain, value if many else [value]))
        if key not in known or not plain:
            raise UserError(f"the backbone's spec has {key}={_short(value)}, which no {kind} has.")
    given = 1 if kind == Compact.kind else 0
    for key, value in validated(family, keywords, "spec.", num_given=given).items():
        most = _MOST_BLOCKS if key in ("depth", "depths") else _LARGEST
        sizes = value if isinstance(value, list) else [value]
        if any(isinstance(size, int) and abs(size) > most for size in sizes):
            raise UserError(
                f"the backbone's spec has {key}={_short(value)}: at most {most:,} can be opened."
            )
    return told


def _is_plain(value: Any) -> bool:
    """Whether `value` is text without interpolation, null, a truth value or a finite number."""
    if isinstance(value, str):
        return "$" not in value
    return value is None or (isinstance(value, bool | int | float) and abs(value) < math.inf)


def _short(value: Any) -> str:
    text = shown(value) if isinstance(value, bool | int | float | None) else repr(value)
    return text if len(text) < 60 else f"{text[:60]}…"


def is_trusted(name: str, trust: Trust) -> bool:
    """Whether `trust` contains the dotted `name` or one of its parent packages."""
    packages = [trust] if isinstance(trust, str) else trust or ()
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def untrusted(what: str, name: str) -> UserError:
    """The error to raise for a dotted `name` in `what` whose package is not trusted."""
    package = name.partition(".")[0]
    return UserError(
        f"{what} names {name}, code of the package {package}: if you trust that package, "
        f"allow its import with trust='[{package}]'."
    )


def _import(kind: str, trust: Trust) -> type[Backbone]:
    """The class at `kind`, "module:Class". Raises UserError."""
    module, colon, name = kind.partition(":")
    if not colon:
        known = ", ".join(_FAMILIES)
        raise UserError(f"unknown backbone kind={kind}: known are {known}, and module:Class.")
    if not is_trusted(module, trust):
        raise untrusted("the backbone", f"{module}.{name}")
    try:
        found = pkgutil.resolve_name(kind)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(
            f"the backbone's class {kind} cannot be imported ({error}): install its package, or "
            "put it on PYTHONPATH."
        ) from error
    if not (isinstance(found, type) and issubclass(found, Backbone)):
        raise UserError(f"{kind} is not a subclass of dino_lite.contracts.Backbone.")
    return found


def check_spec(backbone: Any) -> Backbone:
    """Return `backbone` if its class and its spec, as files store them, rebuild the same network;
    else raise UserError with the class and the first difference.

    Compares names and shapes of weights, and sizes; our own families are rebuilt on the meta
    device. For other families, whose spec may lack a keyword that changes no shape, also compares
    the tokens of two small images with the same weights. The random state and training modes are
    preserved.
    """
    family = type(backbone)
    named = f"{family.__module__}.{family.__qualname__}"
    if not isinstance(backbone, Backbone):
        raise UserError(f"{named} is not a backbone: derive it from dino_lite.contracts.Backbone.")
    for name in ("spec", *_SIZES):
        if not hasattr(backbone, name):
            raise UserError(f"{named} has no attribute {name}: every Backbone sets it.")
    ours = family.kind in _FAMILIES
    if not ours and _found(family.kind) is not family:
        raise UserError(
            f"{named} cannot be imported by this name, so its exports could not be loaded: define "
            "the class at the top level of a module."
        )
    try:
        spec = json.loads(json.dumps(backbone.spec))
        with torch.random.fork_rng(devices=[]), torch.device("meta") if ours else nullcontext():
            twin = family(**spec)
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise UserError(
            f"{named} cannot be built from its own spec ({reason}): spec must hold the "
            "constructor's keywords, as plain JSON."
        ) from error
    different = _first_difference(backbone, twin)
    if different is None and not ours:
        different = _different_tokens(backbone, twin)
    if different is not None:
        raise UserError(
            f"{named}(**spec) builds a different network, {different}: put every keyword that "
            "changes the network into spec."
        )
    return backbone


def _found(kind: str) -> Any:
    """The object at "module:Class"; None if it cannot be imported."""
    try:
        return pkgutil.resolve_name(kind)
    except (ImportError, AttributeError, ValueError):
        return None


def _first_difference(backbone: Backbone, twin: Backbone) -> str | None:
    """The first difference between two networks: names and shapes of weights, then sizes."""
    own, other = ({n: tuple(v.shape) for n, v in b.state_dict().items()} for b in (backbone, twin))
    for name in [*own, *other]:
        if own.get(name) != other.get(name):
            shapes = [str(shapes.get(name, "missing")) for shapes in (other, own)]
            return f"in which {name} is {shapes[0]} and not {shapes[1]}"
    for name in _SIZES:
        if getattr(backbone, name) != getattr(twin, name):
            return f"whose {name} is {getattr(twin, name)} and not {getattr(backbone, name)}"
    return None


def _different_tokens(backbone: Backbone, twin: Backbone) -> str | None:
    """The first difference between tokens of images of 2x2 patches if `twin` has the weights of
    `backbone`; None also if `backbone` raises for these images.
    """
    like = next(backbone.parameters(), torch.empty(0))
    twin.to(like).load_state_dict(backbone.state_dict())
    side = 2 * backbone.patch_size
    fixed = torch.Generator().manual_seed(0)
    images = torch.randn(2, backbone.in_chans, side, side, generator=fixed).to(like)
    with torch.random.fork_rng(devices=[]):
        state = torch.get_rng_state()
        try:
            own = _evaluated(backbone, images)
        except Exception:  # for example, it needs larger images
            return None
        torch.set_rng_state(state)
        try:
            other = _evaluated(twin, images)
        except Exception as error:
            return f"whose forward pass raises {type(error).__name__}"
    for name, mine, its in zip(Tokens._fields, own, other, strict=True):
        if not _close(mine, its):
            return f"whose {name} of the same image with the same weights differ"
    return None


def _evaluated(backbone: Backbone, images: torch.Tensor) -> Tokens:
    """Tokens in evaluation mode, without gradients; the modes of all modules are restored."""
    modes = [(part, part.training) for part in backbone.modules()]
    try:
        with torch.no_grad():
            return backbone.eval()(images)
    finally:
        for part, mode in modes:
            part.training = mode


def _close(mine: Any, its: Any) -> bool:
    """Whether two fields of `Tokens` are equal, tensors up to the rounding of single precision."""
    if not (isinstance(mine, torch.Tensor) and isinstance(its, torch.Tensor)):
        return not (isinstance(mine, torch.Tensor) or isinstance(its, torch.Tensor)) and mine == its
    if mine.shape != its.shape:
        return False
    largest = mine.abs().max().item() if mine.numel() else 0.0
    return torch.allclose(mine, its, rtol=0, atol=1e-6 * largest, equal_nan=True)
