"""Refuses files whose content contradicts itself or is no network's."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from dino_lite.contracts import Backbone, UserError

P = ParamSpec("P")
R = TypeVar("R")
LARGEST_SIDE = 2**16  # pixels

# What reading weights and JSON raises when these are not what their names say.
_CONTRADICTIONS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)


def refusing(argument: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorator: errors from the content of the file or folder that `argument` names become a
    UserError.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            try:
                return function(*args, **kwargs)
            except _CONTRADICTIONS as error:
                path = signature.bind(*args, **kwargs).arguments[argument]
                text = " ".join(str(error).split())
                raise UserError(
                    f"{path} cannot be opened: its weights, or the JSON beside them, are not what "
                    f"their names say ({type(error).__name__}: {text[:200]})."
                ) from error

        return call

    return decorate


def refuse_unsound(weights: Mapping[str, Tensor], own: Mapping[str, Tensor], asked: str) -> None:
    """Raise UserError with the name of the first tensor that is not dense, is quantized, is not in
    floating point though that of `own`, a network's weights, is, or has a value that is not finite.
    `asked` is the prefix of messages.
    """
    for name, value in weights.items():
        integers = value.dtype in (torch.int8, torch.uint8) and value.ndim > 1
        if integers or value.layout != torch.strided or value.is_quantized or value.is_meta:
            raise UserError(
                f"{asked}: the weight {name} is quantized, sparse or without values: give the "
                "weights in floating point."
            )
        real = name not in own or own[name].is_floating_point()
        if value.is_complex() or (real and not value.is_floating_point()):
            raise UserError(
                f"{asked}: the weight {name} has the type {str(value.dtype).removeprefix('torch.')}"
                ": give the weights in floating point."
            )
        if value.is_floating_point() and value.numel() and not _is_finite(value):
            raise UserError(
                f"{asked}: the weight {name} has values that are not finite (NaN or infinite): "
                "the file is damaged, or its training diverged; give another checkpoint."
            )


def refuse_larger(spec: Mapping[str, Any], weights: Mapping[str, Tensor], asked: str) -> None:
    """Raise UserError if the network of `spec`, a sound one of ours, must have more values than
    `weights`: by arithmetic, since building it takes seconds.
    """
    while "whole" in spec:
        spec = spec["whole"]
    depths = spec.get("depths") or [spec.get("depth") or 0]
    widths = spec.get("widths") or [spec.get("embed_dim") or 0]
    found = sum(value.numel() for value in weights.values())
    # The last layer of a block maps at least an eighth of its width to its width.
    least = sum(depth * width * (width // 8) for depth, width in zip(depths, widths, strict=False))
    if ":" not in spec.get("kind", "") and (least > found or sum(depths) > len(weights)):
        raise UserError(
            f"{asked} does not fit the backbone that the config.json next to it describes: it has "
            f"{found:,} values in {len(weights):,} tensors, and {sum(depths):,} blocks of up to "
            f"{max(widths):,} channels have more; export both again, together."
        )


def sizes_of(backbone: Backbone) -> dict[str, int]:
    """What an export's config.json says of a backbone besides its spec."""
    return {
        "embed_dim": backbone.embed_dim,
        "num_parameters": sum(parameter.numel() for parameter in backbone.parameters()),
        "patch_size": backbone.patch_size,
        "in_chans": backbone.in_chans,
    }


def refuse_contradiction(
    about: Mapping[str, Any], own: Mapping[str, Any], asked: str, whose: str
) -> None:
    """Raise UserError if `about`, the config.json of an export, has another value for a key of
    `own`; `whose` says where that one is from.
    """
    for key, value in own.items():
        if about.get(key, value) != value:
            raise UserError(
                f"{asked} has {key}={str(about[key])[:100]}, but it is {value} in {whose}: export "
                "the backbone again."
            )
    if not isinstance(about.get("card"), dict | None):
        raise UserError(
            f"{asked} has card={str(about['card'])[:100]}: it must be an object, or missing."
        )


def refuse_misfit(
    own: Mapping[str, Tensor],
    weights: Mapping[str, Tensor],
    asked: str,
    names: Iterable[str] | None = None,
) -> None:
    """Raise UserError with the first of `names` (default: all) whose shapes differ in `own`, a
    network's weights, and in `weights`, a file's.
    """
    if differs := misfit(own, weights, names):
        raise UserError(
            f"{asked} does not fit the backbone that the config.json next to it describes: "
            f"{differs} there; export both again, together."
        )


def misfit(
    own: Mapping[str, Tensor], weights: Mapping[str, Tensor], names: Iterable[str] | None = None
) -> str:
    """ "NAME is SHAPE in the file and SHAPE", of the first of `names` (default: all) whose shapes
    differ in `own`, a network's weights, and in `weights`, a file's; "" if all agree.
    """
    for name in [*own, *weights] if names is None else names:
        here, there = (tuple(v[name].shape) if name in v else "missing" for v in (own, weights))
        if here != there:
            return f"{name} is {there} in the file and {here}"
    return ""


def _is_finite(value: Tensor) -> bool:
    bounds = torch.stack(torch.aminmax(value.detach().float()))  # NaN if any is
    return bool(bounds.isfinite().all())


def refuse_preprocessing(about: Mapping[str, Any], in_chans: int, asked: str) -> None:
    """Raise UserError unless "image_size" (pixels), "mean" and "std" of `about` are possible for
    images of `in_chans` channels.
    """
    side = about["image_size"]
    if type(side) is not int or not 0 < side <= LARGEST_SIDE:
        raise UserError(
            f"{asked} has image_size={side!r}: it must be a whole number of pixels from 1 to "
            f"{LARGEST_SIDE:,}."
        )
    for name, what in (("mean", "finite"), ("std", "positive")):
        values = about[name]
        if not (
            isinstance(values, list | tuple)
            and len(values) == in_chans
            and all(_is_number(value) and (name == "mean" or value > 0) for value in values)
        ):
            raise UserError(
                f"{asked} has {name}={str(values)[:100]}: it must be a list of {in_chans} {what} "
                "numbers, one a channel."
            )


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value)  # type: ignore[arg-type]
