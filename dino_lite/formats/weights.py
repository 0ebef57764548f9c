"""Loads backbone weights from a file: the layout is detected from names, and all must fit."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import constants
from huggingface_hub.utils import get_session  # type: ignore[attr-defined]
from timm.models import adapt_input_conv
from timm.models.convnext import ConvNeXt
from timm.models.resnet import ResNet
from torch import Tensor, nn

from dino_lite.backbones.convnet import ConvNet
from dino_lite.backbones.rope import is_dinov3
from dino_lite.backbones.spec import build_backbone
from dino_lite.backbones.transformer import Transformer
from dino_lite.backbones.vit import ViT
from dino_lite.contracts import Backbone, UserError
from dino_lite.data.preprocessing import IMAGENET_MEAN, IMAGENET_STD, Preprocessing
from dino_lite.formats.convnets import shaped, stem_of
from dino_lite.formats.layouts import (
    LOOKED_FOR,
    STEM,
    Found,
    find_backbone,
    own_weights,
    spec_of,
)
from dino_lite.formats.opened import Fit, Opened
from dino_lite.formats.tensors import read_about, read_tensors, weights_file
from dino_lite.wording import count

_SECONDS_TO_ANSWER = 5


def load_pretrained(backbone: Backbone, path: str | Path) -> Fit:
    """Load the weights in `path` into `backbone`, strictly; heads for other tasks are unused.

    ViTs, ResNets and ConvNeXts take weights by the names of others too, any other backbone by its
    own names. A position embedding of another grid is resampled by the backbone's own rule; the
    first convolution of RGB images is adapted to other channels as in timm. Raises UserError if
    anything else does not fit: no weights are loaded partially.
    """
    asked = f"backbone.pretrained={path}"
    tensors, about = read_tensors(path), read_about(weights_file(path))
    if isinstance(backbone, Transformer):
        found = _find(tensors, about, asked)
    else:
        foreign = isinstance(backbone, ConvNet) and "spec" not in about
        theirs = _searched(tensors, about, asked) if foreign else None
        found = theirs or own_weights(tensors, next(iter(backbone.state_dict())))
    return _fill(backbone, found, asked)


def open_weights(path: str | Path, key: str = "checkpoint", **overrides: Any) -> Opened:
    """The backbone in a file or folder of dino_lite, DINO, DINOv2, DINOv3, timm, torchvision or
    Hugging Face.

    Its architecture is derived from shapes and from config.json next to the file; `overrides` are
    keywords of the spec that take precedence. `key` is the setting whose value is `path`, for
    messages. Raises UserError.
    """
    asked, file = f"{key}={path}", weights_file(path)
    tensors, about = read_tensors(path, key), read_about(file)
    own = about.get("spec")  # of an export
    mine = isinstance(own, dict) and bool(tensors)
    found = own_weights(tensors, next(iter(tensors))) if mine else _find(tensors, about, asked)
    if found.prefix.startswith("state_dict.method."):  # our checkpoint: the spec is in its run
        raise UserError(
            f"{path}: config.yaml of its run is not two folders up; keep checkpoints in their run."
        )
    spec = own | overrides if isinstance(own, dict) else spec_of(found, about, asked, **overrides)
    return _open(spec, found, about, asked, weights_file(path).name)


def convnet_in(path: str | Path) -> dict[str, Any] | None:
    """The spec of the convnet whose weights another program, or a run, left in `path`, to start
    from; None for any other file. Raises UserError if it cannot be read.
    """
    asked = f"backbone.pretrained={path}"
    tensors, about = read_tensors(path), read_about(weights_file(path))
    found = _searched(tensors, about, asked)
    if found is None or found.read.spec.get("kind") != ConvNet.kind:
        return None
    return spec_of(found, about, asked)


def open_timm(name: str) -> Opened:
    """The timm model `name` with its published weights, downloaded unless cached.

    Raises UserError if it does not exist, is unsupported or cannot be downloaded.
    """
    asked = f"checkpoint=timm:{name}"
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
        spec = {"kind": ConvNet.kind, "name": name.partition(".")[0], "norm": norm}
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
        own = {"kind": "rope"} if is_dinov3(model) else {"image_size": about["input_size"][1]}
        spec = {"name": name, "patch_size": stem.patch_size[0], **own}
    _empty(spec)  # raises UserError for unsupported models before downloading
    try:
        with _one_try(), torch.random.fork_rng(devices=[]):
            model = timm.create_model(name, pretrained=True, num_classes=0)
    except Exception as error:  # from the network, the hub, its cache, or missing weights
        raise UserError(
            f"{asked} could not be downloaded: are you offline, or has this model no published "
            "weights?"
        ) from error
    found = _find(dict(model.state_dict()), {"architecture": name}, asked)
    return _open(spec, found, {"pretrained_cfg": about}, asked, f"timm:{name}")


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


def _empty(spec: dict[str, Any]) -> Backbone:
    """The backbone of a spec on the meta device; the random state is preserved."""
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        return build_backbone(spec)


def _open(
    spec: dict[str, Any], found: Found, about: dict[str, Any], asked: str, name: str
) -> Opened:
    backbone = _empty(spec)
    if {name for name, _ in backbone.named_buffers()} - backbone.state_dict().keys():
        with torch.random.fork_rng(devices=[]):  # with the constants that no file contains
            backbone = build_backbone(spec).eval()
    else:
        backbone = backbone.to_empty(device="cpu").eval()
    fit = _fill(backbone, found, asked)
    mean, std = _normalization(about, backbone.in_chans)
    size = _image_size(backbone, about)
    return Opened(
        backbone=backbone,
        preprocessing=Preprocessing((size, size), mean, std),
        card={"weights": name, "layout": fit.layout},
        fit=fit,
    )


def _image_size(backbone: Backbone, about: dict[str, Any]) -> int:
    """Pixels per side for which the weights were trained: from learned positions if any, else from
    `about`, else 224 of a convnet, or 16 patches as in DINOv3.
    """
    told = about.get("image_size") or (about.get("pretrained_cfg") or {}).get("input_size", [0])[-1]
    size = int(backbone.spec.get("image_size") or told)
    if isinstance(backbone, ConvNet):
        return size or 224
    return size if size and size % backbone.patch_size == 0 else 16 * backbone.patch_size


def _fill(backbone: Backbone, found: Found, asked: str) -> Fit:
    """Load the weights of `found`, adapted to channels and grid, or raise UserError if any weight
    is missing, unknown or of another shape.
    """
    own, unused = backbone.state_dict(), list(found.read.unused)
    if isinstance(backbone, ConvNet):
        found = found._replace(read=found.read._replace(weights=shaped(found.weights, own)))
    weights = dict(found.weights)
    if "mask_token" not in own and weights.pop("mask_token", None) is not None:
        unused.append("mask_token")
    for name in [n for n in weights if n.endswith(("q_bias", "v_bias")) and n not in own]:
        if not weights[name].any():  # most DINOv3 models have biases that are zero
            del weights[name]
            unused.append(name)
    if "pos_embed" in weights and isinstance(backbone, ViT):
        weights["pos_embed"] = fit_positions(weights["pos_embed"], backbone)
    stem = stem_of(weights) or STEM
    if stem in weights:
        weights[stem] = _fit_channels(weights[stem], backbone.in_chans, asked)
    missing = sorted(own.keys() - weights.keys())
    extra = sorted(weights.keys() - own.keys())
    wrong = sorted(n for n in own.keys() & weights.keys() if own[n].shape != weights[n].shape)
    if missing or extra or wrong:
        n = (missing or extra or wrong)[0]
        shapes = (
            f" ({tuple(weights[n].shape)} in the file, {tuple(own[n].shape)} here)"
            if wrong == [n]
            else ""
        )
        raise UserError(
            f"{asked} does not fit the backbone: {count(len(missing), 'weight')} "
            f"missing, {len(extra)} "
            f"unknown, {len(wrong)} of another shape, the first {n}{shapes}; choose the "
            "backbone it was made for."
        )
    backbone.load_state_dict(weights)
    changed = [n for n in weights if n in found.adapted or weights[n] is not found.weights[n]]
    return Fit(found.read.owner, found.read.why, len(own), unused, changed)


def _fit_channels(learned: Tensor, in_chans: int, asked: str) -> Tensor:
    """Adapt the patch embedding from RGB to `in_chans` channels: the sum of RGB's weights for one
    channel, else RGB's weights repeated and scaled by 3 / `in_chans`.
    """
    found = learned.shape[1] if learned.ndim == 4 else in_chans
    if found == in_chans:
        return learned
    if found != 3:
        raise UserError(
            f"{asked} takes images of {count(found, 'channel')}, the backbone "
            f"{in_chans}: only weights for 3 can be adapted, so set data.channels={found}."
        )
    adapted: Tensor = adapt_input_conv(in_chans, learned)
    return adapted


def fit_positions(learned: Tensor, backbone: ViT) -> Tensor:
    """Resample a position embedding "1 1+cells D" of a square grid to the backbone's grid."""
    cells = round((learned.shape[1] - 1) ** 0.5)
    if learned.shape == backbone.pos_embed.shape or cells * cells != learned.shape[1] - 1:
        return learned
    square = learned[:, 1:].float().reshape(1, cells, cells, -1)
    sampled = backbone.resample(square, backbone.grid).to(learned.dtype)
    return torch.cat([learned[:, :1], sampled], dim=1)


def _normalization(about: dict[str, Any], in_chans: int) -> list[tuple[float, ...]]:
    """Mean and std from `about` (our, timm's or Hugging Face's keys), else ImageNet's."""
    about = about | (about.get("pretrained_cfg") or {})
    found = []
    for names, usual in (
        (("mean", "image_mean"), IMAGENET_MEAN),
        (("std", "image_std"), IMAGENET_STD),
    ):
        told = next((about[name] for name in names if name in about), usual)
        values = tuple(float(value) for value in told)
        found.append(values if len(values) == in_chans else (sum(values) / len(values),) * in_chans)
    return found
