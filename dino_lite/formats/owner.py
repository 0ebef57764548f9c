"""What is known of a foreign program's weights: how they are found in a file, and their names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

Tensors = dict[str, Tensor]
Pairs = tuple[tuple[str, str], ...]  # of their names and ours


BY_FILE = "the file's name"  # what may tell the architecture; the shapes overrule it


class Read(NamedTuple):
    """The weights of a backbone by our names, as an owner's names were read."""

    owner: str  # for messages: "Hugging Face Dinov2"
    why: str  # how it was told from others, one clause: "its names begin with embeddings."
    weights: Tensors
    unused: list[str]  # their names of what is not part of the backbone, such as heads
    # Keywords of the backbone's spec that shapes do not tell: "kind", how positions are resampled,
    # the epsilon of norms.
    spec: dict[str, Any]
    num_heads: int | None = None  # if known from more than the width
    preprocessing: dict[str, Any] | None = None  # as timm's pretrained_cfg, if nothing else says
    class_position: bool | None = True  # whether the class token has a learned position; see grids


class Owner(NamedTuple):
    """How one program names the weights of its backbones.

    A file of theirs has a name that ends in `anchor`; what precedes it is the prefix, which is
    removed from all names; those that begin with `bare` may lack it. `read` gets the names below
    the prefix, and the JSON beside the file with the key `prefix` added; it returns None if the
    weights are another owner's.
    """

    anchor: str
    read: Callable[[Tensors, dict[str, Any]], Read | None]
    bare: str | None = None


def joined_qkv(parts: dict[str, Tensors]) -> Tensors:
    """The separate layers "q", "k" and "v" as one layer, where all three exist."""
    return {
        name: torch.cat([found[word] for word in "qkv"])
        for name, found in parts.items()
        if len(found) == 3
    }


def renamed(name: str, pairs: Pairs) -> str:
    """`name` with its beginning replaced by the first pair (theirs, ours) that fits."""
    for theirs, ours in pairs:
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    return name


def gated_mlp(weights: Tensors, gate: str, value: str, out: str) -> Tensors:
    """Rename an MLP's layers to ours; gate and value, if it has both, are concatenated."""
    found: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        stem, mlp, rest = name.partition(".mlp.")
        layer, _, kind = rest.partition(".")
        first = f"{stem}.mlp.fc1.{kind}"
        if not mlp or layer not in (gate, value, out):
            found[name] = tensor
        elif layer == out:
            found[f"{stem}.mlp.fc2.{kind}"] = tensor
        elif layer == value:
            other = weights.get(f"{stem}.mlp.{gate}.{kind}")
            found[first] = tensor if other is None else torch.cat([other, tensor])
    return found
