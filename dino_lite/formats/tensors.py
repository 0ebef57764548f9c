"""Reads the tensors of a file and its JSON metadata, without unpickling arbitrary objects."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from dino_lite.contracts import UserError

WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # names of the weights file in a folder
SHARDED = tuple(f"{name}.index.json" for name in WEIGHTS)  # of the index of several such files


def read_tensors(path: str | Path, key: str = "backbone.pretrained") -> dict[str, Tensor]:
    """All tensors of a .safetensors file, a torch file or a folder with one, by dotted name.

    `key` is the setting whose value is `path`, for messages. A torch file may contain nested
    dictionaries of tensors, plain values, and the argparse.Namespace of DINO's training
    checkpoints. Raises UserError.
    """
    return read_file(path, key)[0]


def read_file(
    path: str | Path, key: str = "backbone.pretrained"
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """As `read_tensors`, and what timm's training says of the model: "arch", "args", "version"."""
    file = weights_file(path)
    if not file.is_file():
        raise UserError(
            f"{key}={path}: there is no such file; name a checkpoint or an exported folder."
        )
    if file.name in SHARDED:
        return _read_shards(file, key), {}
    try:
        if file.suffix == ".safetensors":
            return load_file(file), {}
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(
            f"{key}={path} cannot be read as weights ({type(error).__name__}): it is damaged, or "
            "neither a .safetensors file nor a torch.save file of tensors and plain values."
        ) from error
    top = content if isinstance(content, dict) else {}
    return dict(_flat(content)), {k: top[k] for k in ("arch", "args", "version") if k in top}


def _read_shards(index: Path, key: str) -> dict[str, Tensor]:
    """All tensors of the files next to Hugging Face's `index` that it names."""
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        files = [index.parent / name for name in sorted(names)]
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"{key}={index} is not an index of weights files ({type(error).__name__}): download "
            "it again."
        ) from error
    for file in files:
        if file.parent != index.parent or file.name in SHARDED or not file.is_file():
            raise UserError(
                f"{key}={index} names {file.name}, which is not a weights file next to it: "
                "download all files of the folder."
            )
    return {name: value for file in files for name, value in read_tensors(file, key).items()}


def weights_file(path: str | Path) -> Path:
    """`path`, or the weights file, or the index of several, in it if it is a folder."""
    file = Path(path).expanduser()
    if not file.is_dir():
        return file
    inside = [file / name for pair in zip(WEIGHTS, SHARDED, strict=True) for name in pair]
    return next((found for found in inside if found.is_file()), inside[0])


def read_about(file: Path) -> dict[str, Any]:
    """Metadata of `file`: the contents of config.json and of Hugging Face's image processor next to
    it if it has one of the names `WEIGHTS` or `SHARDED`, else of NAME.json next to it.
    """
    about: dict[str, Any] = {}
    names = ("preprocessor_config.json", "processor_config.json", "config.json")
    for name in names if file.name in WEIGHTS + SHARDED else (f"{file.stem}.json",):
        try:
            content = json.loads((file.parent / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue  # missing, or not JSON
        if isinstance(content, dict):
            nested = content.get("image_processor") if name == names[1] else None
            about |= nested if isinstance(nested, dict) else content
    return about


def _flat(content: Any, prefix: str = "") -> list[tuple[str, Tensor]]:
    """Tensors in nested dictionaries; entries with integer keys (optimizer state) are skipped."""
    if isinstance(content, Tensor) and prefix:
        return [(prefix[:-1], content)]
    if not isinstance(content, dict):
        return []
    named = [(name, value) for name, value in content.items() if isinstance(name, str)]
    return [pair for name, value in named for pair in _flat(value, f"{prefix}{name}.")]
