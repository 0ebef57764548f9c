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
from torch import Tensor

from dino_lite.backbones.rope import is_dinov3
from dino_lite.backbones.spec import checked_spec, empty_backbone
from dino_lite.backbones.timm_models import check_name
from dino_lite.backbones.transformer import Transformer
from dino_lite.backbones.vit import ViT
from dino_lite.contracts import Backbone, UserError
from dino_lite.data.preprocessing import IMAGENET_MEAN, IMAGENET_STD, Preprocessing
from dino_lite.formats.layouts import (
    LOOKED_FOR,
    STEM,
    Found,
    find_backbone,
    own_weights,
    spec_of,
)
from dino_lite.formats.opened import Fit, Opened
from dino_lite.formats.sound import (
    refuse_misfit,
    refuse_preprocessing,
    refuse_unsound,
    refusing,
)
from dino_lite.formats.tensors import read_about, read_tensors, weights_file
from dino_lite.wording import count

_SECONDS_TO_ANSWER = 5


@refusing("path")
def load_pretrained(backbone: Backbone, path: str | Path) -> Fit:
    """Load the weights in `path` into `backbone`, strictly; heads for other tasks are unused.

    A ViT takes weights by the names of others too, any other backbone by its own names. A position
    embedding of another grid is resampled by the backbone's own rule; a patch embedding of RGB
    images is adapted to other channels as in timm. Raises UserError if anything else does not fit:
    no weights are loaded partially.
    """
    asked = f"backbone.pretrained={path}"
    tensors, about = read_tensors(path), read_about(weights_file(path))
    if isinstance(backbone, Transformer):
        return _fill(backbone, _find(tensors, about, asked), asked)
    return _fill(backbone, own_weights(tensors, next(iter(backbone.state_dict()))), asked)


@refusing("path")
def open_weights(path: str | Path, key: str = "checkpoint", **overrides: Any) -> Opened:
    """The backbone in a file or folder of dino_lite, DINO, DINOv2, DINOv3, timm or Hugging Face.

    Its architecture is derived from shapes and from config.json next to the file; `overrides` are
    keywords of the spec that take precedence. `key` is the setting whose value is `path`, for
    messages. Raises UserError.
    """
    asked, file = f"{key}={path}", weights_file(path)
    tensors, about = read_tensors(path, key), read_about(file)
    found = _find(tensors, about, asked)
    if found.prefix.startswith("state_dict.method."):  # our checkpoint: the spec is in its run
        raise UserError(
            f"{path}: config.yaml of its run is not two folders up; keep checkpoints in their run."
        )
    own = about.get("spec")  # of an export
    if own is None:
        spec = spec_of(found, about, asked, **overrides)
    else:
        spec = checked_spec(own) | overrides
    if own is not None and not overrides:
        refuse_misfit(_empty(spec).state_dict(), found.weights, asked, ("pos_embed",))
    return _open(spec, found, about, asked, weights_file(path).name)


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
    if not hasattr(stem, "patch_size"):
        raise UserError(f"{asked} is not a vision transformer, and others cannot be opened.")
    about = told.to_dict()
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


def _find(tensors: dict[str, Tensor], about: dict[str, Any], asked: str) -> Found:
    found = find_backbone(tensors, about)
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


def _empty(spec: dict[str, Any]) -> Transformer:
    """The backbone of a spec on the meta device."""
    backbone = empty_backbone(spec)
    if not isinstance(backbone, Transformer):
        raise UserError(
            f"a {type(backbone).__name__} cannot be opened from its weights file alone: give the "
            "exported folder."
        )
    return backbone


def _open(
    spec: dict[str, Any], found: Found, about: dict[str, Any], asked: str, name: str
) -> Opened:
    backbone = _empty(spec).eval()
    fit = _fill(backbone, found, asked)
    mean, std = _normalization(about, backbone.in_chans)
    size = _image_size(backbone, about)
    told = {"image_size": size, "mean": mean, "std": std}
    refuse_preprocessing(told, backbone.in_chans, asked)
    return Opened(
        backbone=backbone,
        preprocessing=Preprocessing((size, size), mean, std),
        card={"weights": name, "layout": fit.layout},
        fit=fit,
    )


def _image_size(backbone: Transformer, about: dict[str, Any]) -> int:
    """Pixels per side for which the weights were trained: from learned positions if any, else from
    `about`, else 16 patches as in DINOv3.
    """
    told = about.get("image_size") or (about.get("pretrained_cfg") or {}).get("input_size", [0])[-1]
    size = int(backbone.spec.get("image_size") or told)
    return size if size and size % backbone.patch_size == 0 else 16 * backbone.patch_size


def _fill(backbone: Backbone, found: Found, asked: str) -> Fit:
    """Load the weights of `found`, adapted to channels and grid, or raise UserError if any weight
    is missing, unknown or of another shape.
    """
    own, weights, unused = backbone.state_dict(), dict(found.weights), list(found.read.unused)
    if "mask_token" not in own and weights.pop("mask_token", None) is not None:
        unused.append("mask_token")
    for name in [n for n in weights if n.endswith(("q_bias", "v_bias")) and n not in own]:
        if not weights[name].any():  # most DINOv3 models have biases that are zero
            del weights[name]
            unused.append(name)
    if "pos_embed" in weights and isinstance(backbone, ViT):
        weights["pos_embed"] = fit_positions(weights["pos_embed"], backbone)
    if STEM in weights:
        weights[STEM] = _fit_channels(weights[STEM], backbone.in_chans, asked)
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
    refuse_unsound(weights, asked)
    if next(iter(own.values())).is_meta:  # no memory is taken for weights that do not fit
        backbone.to_empty(device="cpu")
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
