"""How other programs prepare images, as the JSON beside their weights says."""

from __future__ import annotations

import math
import re
from typing import Any, NamedTuple, get_args

from dino_lite.contracts import Backbone, UserError
from dino_lite.data.preprocessing import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Interpolation,
    Preprocessing,
    Rule,
)

_ImageSize = tuple[int, int]
_HALF = {"image_mean": (0.5, 0.5, 0.5), "image_std": (0.5, 0.5, 0.5)}
_CLIP = {
    "image_mean": (0.48145466, 0.4578275, 0.40821073),
    "image_std": (0.26862954, 0.26130258, 0.27577711),
}
# Defaults of Hugging Face's image processors, by the beginning of their class. Where an integer
# size means the shorter side, the default has this key too.
_PROCESSORS: dict[str, dict[str, Any]] = {
    "ViT": {"size": {"height": 224, "width": 224}, "resample": 2, **_HALF},
    "DeiT": {"size": {"height": 256, "width": 256}, "crop_size": 224, "resample": 3, **_HALF},
    "Bit": {"size": {"shortest_edge": 224}, "crop_size": 224, "resample": 3, **_CLIP},
    "CLIP": {"size": {"shortest_edge": 224}, "crop_size": 224, "resample": 3, **_CLIP},
    "ConvNext": {"size": {"shortest_edge": 384}, "resample": 3, "crop_pct": 224 / 256, **_HALF},
    "DINOv3ViT": {"size": {"height": 224, "width": 224}, "resample": 2},
}
_OF_MODEL = {  # which of them a model has whose JSON names none
    "deit": "DeiT",
    "dinov2": "Bit",
    "dinov2_with_registers": "Bit",
    "convnext": "ConvNext",
    "convnextv2": "ConvNext",
    "resnet": "ConvNext",
    "dinov3_vit": "DINOv3ViT",
    "dinov3_convnext": "DINOv3ViT",
}
_RESAMPLING: tuple[Interpolation, ...] = (  # by Pillow's number
    *("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming"),
)
_LARGEST = 2**14  # pixels per side
_CROPS = (0.1, 4.0)  # of published networks: 0.7 to 1.15
_STDS = (1e-4, 1e4)  # of pixels from 0 to 1
_SQUASHED_FROM = 384  # ConvNext's processor crops smaller images only


class Prepared(NamedTuple):
    """How images are prepared, and one clause each on where that was read and what of it could not
    be followed.
    """

    preprocessing: Preprocessing
    notes: tuple[str, ...] = ()


def read_preprocessing(
    about: dict[str, Any],
    implied: dict[str, Any] | None,
    backbone: Backbone,
    own_size: _ImageSize,
    asked: str,
) -> Prepared:
    """The preprocessing that `about` says, in the words of our exports, Hugging Face's image
    processors or timm's pretrained_cfg; else what their owner does, `implied` in timm's words; else
    the published protocol. `own_size` is the size for which the weights were trained, `asked` the
    prefix of messages. Raises UserError.

    Sizes of others are rounded down to multiples of the patch size if `backbone` needs these; mean
    and std for other numbers of channels are averaged.
    """
    try:
        how, notes = _read(about, implied or {}, own_size)
        how = how._replace(
            mean=_per_channel(how.mean, backbone.in_chans),
            std=_per_channel(how.std, backbone.in_chans),
        )
        _check(how)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise UserError(
            f"{asked}: how images are prepared cannot be read from the JSON beside the weights "
            f"({' '.join(str(error).split())}): correct it there."
        ) from error
    patch, unit = backbone.patch_size, backbone.patch_size if backbone.whole_patches else 1
    rows, columns = (max(side - side % unit, patch) for side in how.size)
    whole = how.at((rows, columns))
    if whole != how:
        told = f"{how.pixels} pixels are no multiple of the patch size {patch}"
        if about.get("preprocessing") is not None:  # an export of ours has sizes that fit
            raise UserError(f"{asked}: its config.json says preprocessing.size={[*how.size]}, but "
                            f"{told}: correct it there.")  # fmt: skip
        notes += (f"{told}: {whole.pixels} are used",)
    return Prepared(whole, notes)


def _check(how: Preprocessing) -> None:
    """Raise ValueError for what no image can be prepared with."""
    size: Any = how.size
    if not isinstance(size, tuple) or len(size) != 2:
        raise ValueError(f"size={size}, which must be [rows, columns]")
    if not all(type(side) is int and 0 < side <= _LARGEST for side in size):
        raise ValueError(f"a size of {size} pixels, of which each must be 1 to {_LARGEST:,}")
    if type(how.crop) not in (int, float) or not _CROPS[0] <= how.crop <= _CROPS[1]:
        raise ValueError(f"crop={how.crop}, which must be {_CROPS[0]} to {_CROPS[1]}")
    if max(size) / how.crop > _LARGEST:
        raise ValueError(f"images are enlarged to size/crop, more than {_LARGEST:,} pixels")
    if not all(_STDS[0] <= value <= _STDS[1] for value in how.std):
        raise ValueError(f"std={[*how.std]}, of which each must be {_STDS[0]:g} to {_STDS[1]:g}")
    if not all(abs(value) <= _STDS[1] for value in how.mean):
        raise ValueError(f"mean={[*how.mean]}, of which none may exceed {_STDS[1]:g}")
    if not isinstance(how.squash, bool) or not isinstance(how.border, bool):
        raise ValueError(f"squash={how.squash!r}, border={how.border!r}: each true or false")
    if how.interpolation not in get_args(Interpolation) or how.rule not in get_args(Rule):
        raise ValueError(f"interpolation {how.interpolation}, rule {how.rule}")


def _read(about: dict[str, Any], implied: dict[str, Any], own_size: _ImageSize) -> Prepared:
    ours, cfg = about.get("preprocessing"), about.get("pretrained_cfg")
    for key, value in (("preprocessing", ours), ("pretrained_cfg", cfg)):
        if not isinstance(value, dict | None):
            raise TypeError(f"{key}={str(value)[:100]}, which must be an object")
    if isinstance(ours, dict):
        return Prepared(Preprocessing.read(ours))
    if isinstance(cfg, dict):
        return _of_timm(implied | cfg, own_size)
    if any(key in about for key in ("image_processor_type", "feature_extractor_type", "resample")):
        return _of_hugging_face(about, own_size)
    if any(key in about for key in ("input_size", "crop_pct", "crop_mode", "interpolation")):
        return _of_timm(implied | about, own_size)
    if implied:
        return _of_timm(implied, own_size)
    mean, std = (about.get(name, about.get(f"image_{name}")) for name in ("mean", "std"))
    return Prepared(Preprocessing(own_size, mean or IMAGENET_MEAN, std or IMAGENET_STD))


def _of_timm(cfg: dict[str, Any], own_size: _ImageSize) -> Prepared:
    """As timm's `create_transform` of the model's data config."""
    told = {key: value for key, value in cfg.items() if value}
    size, notes = own_size, []
    if isinstance(asked := told.get("input_size"), list | tuple):
        size = (int(asked[-2]), int(asked[-1]))
    if told.get("fixed_input_size") and size != own_size:
        notes.append(
            f"the positions are of {Preprocessing(own_size).pixels} pixels and fixed_input_size is "
            f"true, so input_size {Preprocessing(size).pixels} is not followed"
        )
        size = own_size
    method = told.get("interpolation", "bicubic")
    if method not in get_args(Interpolation):
        notes.append(f"interpolation={method} is not followed: bicubic is used")
        method = "bicubic"
    mode = told.get("crop_mode", "center")
    how = Preprocessing(
        size,
        told.get("mean", IMAGENET_MEAN),
        told.get("std", IMAGENET_STD),
        float(told.get("crop_pct", 0.875)),
        mode == "squash",
        method,
        mode == "border",
        "timm",
    )
    return Prepared(how, (f"images as timm's pretrained_cfg says: {how.said()}", *notes))


def _of_hugging_face(about: dict[str, Any], own_size: _ImageSize) -> Prepared:
    """As Hugging Face's image processors."""
    named = about.get("image_processor_type") or about.get("feature_extractor_type") or ""
    kind = re.sub(r"(ImageProcessor|FeatureExtractor).*", "", str(named))
    kind = kind or _OF_MODEL.get(str(about.get("model_type")), "ViT")
    usual = _PROCESSORS.get(kind, {})
    told = usual | {key: value for key, value in about.items() if value is not None}
    size, shorter = _sides(told.get("size"), "shortest_edge" in usual.get("size", ()))
    crops = told.get("do_center_crop", "crop_size" in usual)
    crop = _sides(told.get("crop_size"), False)[0] if crops else None
    notes, squash, ratio = [], size is not None, 1.0
    if shorter and "crop_pct" in told and crop is None:  # ConvNext's
        size = (shorter, shorter)
        squash = shorter >= _SQUASHED_FROM
        ratio = 1.0 if squash else shorter / int(shorter / told["crop_pct"])
    elif shorter:
        size = crop or (shorter, shorter)
        ratio = min(size) / shorter
        if crop is None:
            notes.append("the processor keeps the whole of each image, which is of any shape: the "
                         "center is cropped")  # fmt: skip
    elif size and crop:
        ratios, size = [new / old for new, old in zip(crop, size, strict=True)], crop
        ratio = ratios[0]
        if not math.isclose(*ratios, abs_tol=0.5 / max(size)):
            notes.append(
                "the ratios of crop_size to size differ: that of the rows is used for both"
            )
    elif size is None:
        notes.append(f"size={told.get('size')} is not followed")
        size = crop or own_size
    if not told.get("do_resize", True):
        notes.append("do_resize=false is not followed: images of one size are needed")
        squash, ratio = False, Preprocessing(size).crop
    mean, std = _scaled(told)
    method = told.get("resample", 3)
    known = isinstance(method, int) and 0 <= method < len(_RESAMPLING)
    if not known:
        notes.append(f"resample={method} is not followed: bicubic is used")
    how = Preprocessing(
        size,
        mean,
        std,
        ratio,
        squash,
        _RESAMPLING[method] if known else "bicubic",
        rule="hugging_face",
    )
    return Prepared(how, (f"images as {kind}ImageProcessor's JSON says: {how.said()}", *notes))


def _sides(told: Any, short: bool) -> tuple[_ImageSize | None, int]:
    """Rows and columns, or the shorter side; an integer is the latter if `short`."""
    if isinstance(told, dict):
        if told.get("height") and told.get("width"):
            return (int(told["height"]), int(told["width"])), 0
        alone = not told.get("longest_edge")
        return None, int(told.get("shortest_edge") or 0) if alone else 0
    if isinstance(told, int):
        return (None, told) if short else ((told, told), 0)
    if isinstance(told, list | tuple) and len(told) in (1, 2):
        return (int(told[0]), int(told[-1])), 0
    return None, 0


def _scaled(told: dict[str, Any]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and std of pixels from 0 to 1, whatever the processor's scale is."""
    factor = told.get("rescale_factor", 1 / 255) if told.get("do_rescale", True) else 1.0
    scale = 255 * factor
    scale = 1.0 if math.isclose(scale, 1) else scale
    shift = 1.0 if told.get("rescale_offset") else 0.0
    mean, std = told.get("image_mean", IMAGENET_MEAN), told.get("image_std", IMAGENET_STD)
    if not told.get("do_normalize", True):
        mean, std = (0.0,) * 3, (1.0,) * 3
    return (
        tuple((value + shift) / scale for value in _listed(mean)),
        tuple(value / scale for value in _listed(std)),
    )


def _listed(values: Any) -> tuple[float, ...]:
    found = tuple(values) if isinstance(values, list | tuple) else (values,)
    if any(type(value) not in (int, float) for value in found):
        raise TypeError(f"{str(values)[:100]}, which must be numbers, one a channel")
    return tuple(map(float, found))


def _per_channel(values: Any, in_chans: int) -> tuple[float, ...]:
    """One value per channel: the average, if there are others than `in_chans`."""
    own = _listed(values)
    return own if len(own) == in_chans else (sum(own) / len(own),) * in_chans
