"""Loads backbone weights from a file: the layout is detected from names, and all must fit."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from huggingface_hub import constants
from huggingface_hub.utils import get_session  # type: ignore[attr-defined]
from timm.models.convnext import ConvNeXt
from timm.models.resnet import ResNet
from torch import Tensor, nn

from dino_lite.backbones.compact import Compact
from dino_lite.backbones.convnet import ConvNet
from dino_lite.backbones.rope import is_dinov3
from dino_lite.backbones.spec import build_backbone, checked_spec, empty_backbone
from dino_lite.backbones.timm_models import check_name
from dino_lite.backbones.transformer import Transformer
from dino_lite.backbones.vit import ViT, sides_of
from dino_lite.contracts import Backbone, UserError
from dino_lite.formats.convnets import doubted, refuse_other
from dino_lite.formats.fit import compare_settings, fill
from dino_lite.formats.grids import told_sizes
from dino_lite.formats.layouts import (
    LOOKED_FOR,
    Found,
    find_backbone,
    guessed_heads,
    known_heads,
    own_weights,
    spec_of,
)
from dino_lite.formats.opened import Fit, Opened
from dino_lite.formats.plain import Layout
from dino_lite.formats.processors import read_preprocessing
from dino_lite.formats.sound import (
    refuse_contradiction,
    refuse_larger,
    refuse_misfit,
    refusing,
    sizes_of,
)
from dino_lite.formats.tensors import read_about, read_content, weights_file
from dino_lite.formats.timm_told import completed
from dino_lite.formats.told import check_about
from dino_lite.nn.lora import merged_tensors
from dino_lite.wording import count

_SECONDS_TO_ANSWER = 5


class Content(NamedTuple):
    """The tensors of a file, and what is said of them."""

    tensors: dict[str, Tensor]
    about: dict[str, Any]


@refusing("path")
def load_pretrained(backbone: Backbone, path: str | Path, content: Content | None = None) -> Fit:
    """Load the weights in `path` into `backbone`, strictly; heads for other tasks are unused.

    ViTs, ResNets and ConvNeXts take weights by the names of others too, any other backbone by its
    own names. Positions, patch size and channels of RGB may differ: `fit` converts them. Raises
    UserError if anything else does not fit: no weights are loaded partially. `content` is that of
    the file, if it was read already.
    """
    asked = f"backbone.pretrained={path}"
    tensors, about = content or read_weights(path)
    if isinstance(backbone, Transformer):
        about |= {"expected_size": backbone.spec.get("image_size")}
        vit = _find(tensors, about, asked)
        said = _differences(backbone, vit, about, asked)
        fit = fill(backbone, vit, asked, may_be_fresh=True)
        return fit._replace(said=(*fit.said, *said))
    found = None
    if isinstance(backbone, ConvNet) and "spec" not in about:
        refuse_other(backbone, about, asked)
        if found := _searched(tensors, about, asked):
            found = found._replace(read=doubted(found.read, backbone.spec["name"], about))
    found = found or own_weights(tensors, next(iter(backbone.state_dict())))
    return fill(backbone, found, asked)


def _differences(
    backbone: Transformer, found: Found, about: dict[str, Any], asked: str
) -> tuple[str, ...]:
    """What `compare_settings` says of `backbone` and of the network that the weights are of."""
    exported, heads = about.get("spec"), known_heads(found, about, asked)
    own_heads: Any = backbone.blocks[0].attn.num_heads
    if exported is not None:
        spec = _whole(exported)
    else:
        spec = spec_of(found, about, asked, num_heads=heads or own_heads)
    if spec.get("kind", ViT.kind) != backbone.kind:
        return ()  # the weights will not fit
    told = exported is not None or bool(about.keys() & {"hidden_act", "architecture"})
    return compare_settings(backbone, empty_backbone(spec), told, asked)


def _whole(spec: Any) -> dict[str, Any]:
    """The spec of the backbone of which `spec` may be that of a compact one."""
    whole = checked_spec(spec)
    while whole["kind"] == Compact.kind:
        whole = checked_spec(whole["whole"])
    return whole


@refusing("path")
def open_weights(
    path: str | Path, key: str = "checkpoint", layout: Layout | None = None, **overrides: Any
) -> Opened:
    """The backbone in a file or folder of dino_lite, DINO, DINOv2, DINOv3, timm, torchvision or
    Hugging Face.

    Its architecture is derived from shapes and from config.json next to the file; `layout` says
    whose weights they are if several programs use the same names, `overrides` are keywords of the
    spec that take precedence. `key` is the setting whose value is `path`, for
    messages. Raises UserError.
    """
    asked = f"{key}={path}"
    tensors, about = read_weights(path, key)
    if layout is not None:
        about |= {"checkpoint_layout": layout}
    own = about.get("spec")  # of an export
    mine = isinstance(own, dict) and bool(tensors)
    found = own_weights(tensors, next(iter(tensors))) if mine else _find(tensors, about, asked)
    if found.prefix.startswith("state_dict.method."):  # our checkpoint: the spec is in its run
        raise UserError(
            f"{path}: config.yaml of its run is not two folders up; keep checkpoints in their run."
        )
    if own is None:
        spec = spec_of(found, about, asked, **overrides)
        if spec.get("kind") == ConvNet.kind:
            found = found._replace(read=doubted(found.read, spec["name"], about))
    else:
        spec = checked_spec(own) | overrides
    if own is not None and not overrides:
        refuse_larger(spec, found.weights, asked)
        empty = empty_backbone(spec)
        refuse_misfit(empty.state_dict(), found.weights, asked, ("pos_embed",))
        refuse_contradiction(about, sizes_of(empty), f"{asked}: the JSON beside it", "its spec")
    opened = _open(spec, found, about, asked, weights_file(path).name)
    if own is not None or "num_heads" in overrides or not opened.fit:
        return opened
    guess = guessed_heads(found, about, asked)
    return opened._replace(fit=opened.fit._replace(said=(*opened.fit.said, *filter(None, [guess]))))


def open_timm(name: str) -> Opened:
    """The timm model `name` with its published weights, downloaded unless cached.

    Raises UserError if it does not exist, is unsupported or cannot be downloaded.
    """
    asked = f"checkpoint=timm:{name}"
    check_name(name, asked)
    try:
        told: Any = timm.get_pretrained_cfg(name, allow_unregistered=False)
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            model: Any = timm.create_model(name, num_classes=0)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"{asked}: timm has no such model: {error}.") from error
    stem: Any = getattr(model, "patch_embed", None)
    about = told.to_dict()
    if isinstance(model, ConvNeXt | ResNet):
        norm = "layer" if isinstance(model, ConvNeXt) else "batch"
        spec: dict[str, Any] = {"kind": ConvNet.kind, "name": name.partition(".")[0], "norm": norm}
        if norm == "batch" and not any(isinstance(m, nn.BatchNorm2d) for m in model.modules()):
            raise UserError(
                f"{asked} has no batch normalization: of ResNets, only those with it can be opened."
            )
    elif not hasattr(stem, "patch_size"):
        raise UserError(
            f"{asked} is neither a vision transformer nor a ResNet or ConvNeXt, and others cannot "
            "be opened."
        )
    else:
        size = list(about["input_size"][-2:])
        own = {"kind": "rope"} if is_dinov3(model) else {"image_size": size}
        spec = {"name": name, "patch_size": stem.patch_size[0], **own}
    empty_backbone(spec)  # raises UserError for unsupported models before downloading
    try:
        with _one_try(), torch.random.fork_rng(devices=[]):
            model = timm.create_model(name, pretrained=True, num_classes=0)
    except Exception as error:  # from the network, the hub, its cache, or missing weights
        raise UserError(
            f"{asked} could not be downloaded: are you offline, or has this model no published "
            "weights?"
        ) from error
    said = {"architecture": name, "pretrained_cfg": about}
    found = _find(dict(model.state_dict()), said, asked)
    return _open(spec, found, said, asked, f"timm:{name}")


@contextmanager
def _one_try() -> Iterator[None]:
    """Let huggingface_hub read only its cache, at once, if its server does not answer in a few
    seconds: it would try five times for each of several files, and say so each time.
    """
    before = constants.HF_HUB_OFFLINE
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        if not before:
            get_session().head(constants.ENDPOINT, timeout=_SECONDS_TO_ANSWER)
    except Exception:  # of one of several libraries for HTTP
        constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
        logger.setLevel(level)


def read_weights(path: str | Path, key: str = "backbone.pretrained") -> Content:
    """The tensors of a file, and what is said of them: beside it, else in it, else by its name."""
    file = weights_file(path)
    tensors, values = read_content(path, key)
    beside = read_about(file)
    check_about(beside, f"{key}={path}")
    about = completed(beside, values, file)
    check_about(about, f"{key}={path}")
    return Content(merged_tensors(tensors), about)


def spec_in(path: str | Path) -> dict[str, Any] | None:
    """The spec, with its kind, of the backbone in a file to start from; None if it has none that
    its names and shapes tell. Raises UserError if it cannot be read.
    """
    asked = f"backbone.pretrained={path}"
    tensors, about = read_weights(path)
    if (own := about.get("spec")) is not None:  # of an export
        return _whole(own)
    found = _searched(tensors, about, asked)
    return None if found is None else {"kind": ViT.kind} | spec_of(found, about, asked)


def _searched(tensors: dict[str, Tensor], about: dict[str, Any], asked: str) -> Found | None:
    try:
        return find_backbone(tensors, about)
    except UserError as error:
        raise UserError(f"{asked}: {error}") from error


def _find(tensors: dict[str, Tensor], about: dict[str, Any], asked: str) -> Found:
    found = _searched(tensors, about, asked)
    if found is None and (spec := about.get("spec")):
        raise UserError(
            f"{asked} is the export of a backbone of kind {spec.get('kind')}, not of a ViT: to "
            "open it give the exported folder; to start from it leave out other settings of the "
            "backbone."
        )
    if found is None:
        shown = (
            f"{count(len(tensors), 'tensor')}, the first {next(iter(tensors))}"
            if tensors
            else "none"
        )
        raise UserError(f"{asked} holds no backbone: {LOOKED_FOR}, and found {shown}.")
    return found


def _open(
    spec: dict[str, Any], found: Found, about: dict[str, Any], asked: str, name: str
) -> Opened:
    backbone = empty_backbone(spec)
    if {name for name, _ in backbone.named_buffers()} - backbone.state_dict().keys():
        with torch.random.fork_rng(devices=[]):  # with the constants that no file contains
            backbone = build_backbone(spec)
    fit = fill(backbone.eval(), found, asked)
    own = _own_size(backbone, about)
    how, said = read_preprocessing(about, found.read.preprocessing, backbone, own, asked)
    card = {"weights": name, "layout": fit.layout}
    return Opened(backbone, how, card, fit=fit, said=said)


def _own_size(backbone: Backbone, about: dict[str, Any]) -> tuple[int, int]:
    """Rows and columns for which the weights were trained: from learned positions if any, else from
    `about`, else 224 of a convnet, or 16 patches as in DINOv3.
    """
    patch, own = backbone.patch_size, backbone.spec.get("image_size")
    sizes = [sides_of(own)] if own else told_sizes(about)
    unit = patch if backbone.whole_patches else 1
    fitting = (size for size in sizes if not (size[0] % unit or size[1] % unit))
    usual = 224 if isinstance(backbone, ConvNet) else 16 * patch
    return next(fitting, (usual, usual))
