"""The names of DINOv3's hub."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dino_lite.formats.owner import Owner, Read, Tensors, gated_mlp

_PERIODS = "rope_embed.periods"
BASE = 100.0  # of all DINOv3 models
# Not part of the backbone: the norm of local crops in training, heads of EUPE's distillation.
_LEFT = ("local_cls_norm.", "projectors.")
SPEC: dict[str, Any] = {"kind": "rope", "norm_eps": 1e-5}


def read(own: Tensors, about: dict[str, Any]) -> Read | None:
    """Keys have a (masked) bias; gate and value of the MLP are separate layers."""
    if "pos_embed" in own or not ("storage_tokens" in own or _PERIODS in own):
        return None
    weights: Tensors = {}
    left, periods = [], own.get(_PERIODS)
    for name, value in own.items():
        masked = name.endswith("qkv.bias_mask") or (name == _PERIODS and _is_usual(value))
        if masked or name.startswith(_LEFT):
            left.append(name)
        elif name.endswith("qkv.bias"):
            query, key, bias = value.chunk(3)
            weights |= {f"{name[:-4]}q_bias": query, f"{name[:-4]}v_bias": bias}
            mask = own.get(f"{name}_mask")
            if (key if mask is None else key * mask.chunk(3)[1]).any():
                weights[f"{name[:-4]}k_bias"] = key  # no backbone has it, so loading will fail
        else:
            weights["register_tokens" if name == "storage_tokens" else name] = value
    num_heads = None if periods is None else own["cls_token"].shape[-1] // (4 * len(periods))
    weights = gated_mlp(weights, "w1", "w2", "w3")
    return Read("DINOv3", "it has RoPE's periods or storage tokens", weights, left, SPEC, num_heads)


def _is_usual(periods: Tensor) -> bool:
    """Whether `periods` are RoPE's for base 100, up to the rounding of bfloat16."""
    usual = BASE ** (torch.arange(len(periods)) / len(periods))
    return torch.allclose(periods.float(), usual, rtol=2**-7)


DINOV3 = Owner("cls_token", read)
