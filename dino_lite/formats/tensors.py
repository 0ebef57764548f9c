"""Tensors of a file, whoever wrote it, and what is told beside it: nothing is unpickled freely."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from dino_lite.contracts import UserError

WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # what a folder's file is called


def read_tensors(path: str | Path, key: str = "backbone.pretrained") -> dict[str, Tensor]:
    """All tensors of a .safetensors file, a torch file or a folder with one, by dotted name.

    `key` is what the user set to `path`, for messages. A torch file may hold dictionaries of
    tensors in one another, numbers, and the argparse.Namespace of DINO's training checkpoints.
    """
    file = weights_file(path)
    if not file.is_file():
        raise UserError(
            f"{key}={path}: there is no such file; name a checkpoint or an exported folder."
        )
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(
            f"{key}={path} cannot be read as weights ({type(error).__name__}): it is damaged, or "
            "not a .safetensors file nor one that torch.save made of tensors and plain values."
        ) from error
    return dict(_flat(content))


def weights_file(path: str | Path) -> Path:
    """The file itself, or the one that holds the weights of a folder."""
    file = Path(path).expanduser()
    if not file.is_dir():
        return file
    inside = [file / name for name in WEIGHTS]
    return next((found for found in inside if found.is_file()), inside[0])


def read_about(file: Path) -> dict[str, Any]:
    """What is said of `file`: by config.json and preprocessor_config.json beside a file that is
    called as they are in a folder of their own, by NAME.json beside any other.
    """
    about: dict[str, Any] = {}
    names = ("preprocessor_config.json", "config.json")
    for name in names if file.name in WEIGHTS else (f"{file.stem}.json",):
        try:
            content = json.loads((file.parent / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue  # not there, or somebody else's
        about |= content if isinstance(content, dict) else {}
    return about


def _flat(content: Any, prefix: str = "") -> list[tuple[str, Tensor]]:
    """Tensors in dictionaries in dictionaries; what is numbered (an optimizer's state) is left."""
    if isinstance(content, Tensor) and prefix:
        return [(prefix[:-1], content)]
    if not isinstance(content, dict):
        return []
    named = [(name, value) for name, value in content.items() if isinstance(name, str)]
    return [pair for name, value in named for pair in _flat(value, f"{prefix}{name}.")]
