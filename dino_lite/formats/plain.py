"""The names that DINO, iBOT, DINOv2, timm's VisionTransformer and dino_lite share."""

from __future__ import annotations

import re
from math import isqrt
from typing import Any, NamedTuple

from dino_lite.formats.owner import Owner, Read, Tensors

_OTHER_TASKS = ("head.", "head_dist.", "fc_norm.", "fc.", "pooler.", "classifier.")


class _Rule(NamedTuple):
    """Whose weights, and how that one resamples positions."""

    owner: str
    position_offset: float
    position_antialias: bool


# For offset and antialiasing see dino_family, 1A.7 and 1B.5; an offset of 0 resamples by size.
_DINO = _Rule("DINO", 0.1, False)
_DINOV2 = _Rule("DINOv2", 0.1, False)
_DINOV2_REGISTERS = _Rule("DINOv2 with registers", 0.0, True)
_TIMM = _Rule("timm", 0.0, True)


def read(own: Tensors, about: dict[str, Any]) -> Read:
    """Almost identical names, told apart by what else there is."""
    weights: Tensors = {}
    for name, value in own.items():
        # DINOv2 groups blocks in chunks for FSDP; the second number is the index over all chunks.
        name = re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", name)
        name = name.replace(".mlp.w12.", ".mlp.fc1.").replace(".mlp.w3.", ".mlp.fc2.")
        weights["register_tokens" if name == "reg_token" else name] = value
    (owner, offset, antialias), why = _rule(own, about)
    rules = {"position_offset": offset, "position_antialias": antialias}
    return Read(owner, why, weights, [], rules)


def _rule(own: Tensors, about: dict[str, Any]) -> tuple[_Rule, str]:
    """Distinguish DINOv2 (registers, mask token or SwiGLU), timm (config.json of timm, classifier,
    LayerScale, or no class position) and DINO (all others; timm's names are the same), and say why.
    """
    if "register_tokens" in own:
        return _DINOV2_REGISTERS, "it has register_tokens"
    if "mask_token" in own or any(".mlp.w12." in name for name in own):
        return _DINOV2, "it has a mask token or SwiGLU"
    cells = own["pos_embed"].shape[1] if "pos_embed" in own else 0
    if "architecture" in about:
        return _TIMM, "the JSON beside it names an architecture of timm"
    if any(name.startswith(("head.", "fc_norm.", "head_dist.")) for name in own):
        return _TIMM, "it has a classifier"
    if "blocks.0.ls1.gamma" in own or isqrt(cells) ** 2 == cells:
        return _TIMM, "it has LayerScale, or no position of the class token"
    return _DINO, "it has DINO's names, without a classifier"


PLAIN = Owner("cls_token", read)
