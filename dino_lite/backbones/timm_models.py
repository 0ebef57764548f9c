"""Builds models of timm's registry by name."""

from __future__ import annotations

import re
from typing import Any

import timm

from dino_lite.contracts import UserError


def check_name(name: str, asked: str) -> None:
    """Raise UserError unless `name` has the form of a model in timm's registry, with or without the
    tag of its weights: timm takes names of folders and of hubs too. `asked` is the prefix of the
    message.
    """
    if not re.fullmatch(r"\w+(\.\w+)?", name, re.ASCII):
        raise UserError(
            f"{' '.join(asked.split())} does not name a model of timm's: names of hubs, folders "
            "and files are not followed; give the file of weights itself."
        )


def create_model(name: str, **settings: Any) -> Any:
    """timm's model `name` with fresh weights. Raises UserError if `name` names no model of timm's,
    and what timm raises if it cannot build it.
    """
    check_name(name, f"backbone.name={name}")
    return timm.create_model(name, **settings)
