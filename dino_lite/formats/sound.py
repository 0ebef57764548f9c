"""Refuses files whose content contradicts itself or is no network's."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from dino_lite.contracts import UserError

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


def refuse_unsound(weights: Mapping[str, Tensor], asked: str) -> None:
    """Raise UserError with the name of the first tensor that is not dense, is quantized, or has a
    value that is not finite. `asked` is the prefix of messages.
    """
    for name, value in weights.items():
        integers = value.dtype in (torch.int8, torch.uint8) and value.ndim > 1
        if integers or value.layout != torch.strided or value.is_quantized or value.is_meta:
            raise UserError(
                f"{asked}: the weight {name} is quantized, sparse or without values: give the "
                "weights in floating point."
            )
        if value.is_floating_point() and value.numel() and not _is_finite(value):
            raise UserError(
                f"{asked}: the weight {name} has values that are not finite (NaN or infinite): "
                "the file is damaged, or its training diverged; give another checkpoint."
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
