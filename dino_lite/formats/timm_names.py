"""The names of timm's models that differ from those of `plain`."""

from __future__ import annotations

import re
from typing import Any

from dino_lite.formats.dinov3 import SPEC
from dino_lite.formats.owner import Owner, Read, Tensors, gated_mlp


def read_eva(own: Tensors, about: dict[str, Any]) -> Read | None:
    """DINOv3 as timm's Eva: biases are parameters of the attention, scales of the block."""
    scaled = any(name.endswith(".gamma_1") for name in own)
    if "pos_embed" in own or "reg_token" not in own or not scaled:
        return None
    weights = {}
    for name, value in own.items():
        name = re.sub(r"\.attn\.([qv]_bias)$", r".attn.qkv.\1", name)
        name = re.sub(r"\.gamma_([12])$", r".ls\1.gamma", name)
        weights["register_tokens" if name == "reg_token" else name] = value
    weights = gated_mlp(weights, "fc1_g", "fc1_x", "fc2")
    return Read("timm DINOv3", "its blocks have gamma_1 and it has reg_token", weights, [], SPEC)


EVA = Owner("cls_token", read_eva)
