"""Translates configurations of runs made by earlier versions to current names."""

from __future__ import annotations

from typing import Any

# Class paths, and names of matches (the values of a loss's `reads`), old to current.
CLASSES = {
    "dino_lite.backbones.build.vit": "dino_lite.backbones.vit.ViT",
    "dino_lite.backbones.build.rope": "dino_lite.backbones.rope.RoPEViT",
    "dino_lite.callbacks.pictures.Pictures": "dino_lite.callbacks.drawing.Pictures",
}
MATCHES = {"koleo": "tokens"}


def current(node: Any) -> Any:
    """Replace old names in `node` of a saved configuration, nested or by dotted key."""
    if isinstance(node, list):
        return [current(each) for each in node]
    if not isinstance(node, dict):
        return node
    return {key: _current_value(str(key), value) for key, value in node.items()}


def _current_value(key: str, value: Any) -> Any:
    last = key.rpartition(".")[2]
    if last == "_target_":
        return CLASSES.get(value, value)
    if last == "reads":
        return MATCHES.get(value, value)
    return current(value)
