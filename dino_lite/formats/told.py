"""Checks what the JSON beside weights says before anything is made of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from dino_lite.contracts import UserError

_Kind = tuple[Callable[[Any], bool], str]
_OBJECT: _Kind = (lambda value: isinstance(value, dict), "an object, {...}")
_TEXT: _Kind = (lambda value: isinstance(value, str), "text")
_POSITIVE: _Kind = (
    lambda value: type(value) in (int, float) and 0 < value < math.inf,
    "a positive number",
)
_KINDS: dict[str, _Kind] = {
    **dict.fromkeys(("model_args", "pretrained_cfg", "rope_parameters"), _OBJECT),
    **dict.fromkeys(("architecture", "checkpoint_layout", "hidden_act", "model_type"), _TEXT),
    **dict.fromkeys(("layer_norm_eps", "rope_theta", "pos_embed_rope_base"), _POSITIVE),
}


def check_about(about: dict[str, Any], asked: str) -> None:
    """Raise UserError with the first key of `about` whose value is of another kind than its owner
    writes. `asked` is the prefix of the message.
    """
    for key, (fits, kind) in _KINDS.items():
        if about.get(key) is not None and not fits(about[key]):
            raise UserError(
                f"{asked}: the JSON beside it has {key}={str(about[key])[:80]}, which must be "
                f"{kind}: correct it there."
            )


def heads_of(about: dict[str, Any], asked: str) -> int | None:
    """The number of heads that `about` says; None if it says none. Raises UserError."""
    told = about.get("num_attention_heads")
    if told is None or (type(told) is int and 0 < told <= 2**16):
        return told
    raise UserError(
        f"{asked}: the JSON beside it has num_attention_heads={str(told)[:80]}, which must be a "
        "whole number of at least 1: correct it there."
    )
