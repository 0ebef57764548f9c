"""Which parameters decay, how fast each learns, and how gradients are bounded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

# Learned tokens and positions are inputs, not maps: shrinking them means nothing. The references
# decay them all the same.
TOKENS = ("cls_token", "pos_embed", "register_tokens", "mask_token", "weight_g")

FreezeBy = Literal["gradient", "rate"]
ClipBy = Literal["global", "module", "parameter"]


def param_groups(
    student: nn.Module,
    *,
    decay_tokens: bool = False,
    layer_decay: float = 1.0,
    patch_embed_scale: float = 1.0,
    freeze_by: FreezeBy = "gradient",
) -> list[dict[str, Any]]:
    """Groups for an optimizer of what learns alike, decayed ones first. Biases and one-dimensional
    parameters never decay.

    `student` has its backbone as `.backbone`. `decay_tokens` decays learned tokens, positions and
    the prototypes' lengths too, as DINO does. `layer_decay` and `patch_embed_scale` are those of
    `rate_scale`. `freeze_by="rate"` sets last layers apart, so that `Step` can hold their rate at
    0. Each group carries `rate_scale` (what the rate is multiplied by), `decay` (whether the
    weight-decay schedule is written to it), `last_layer` (whether it was set apart) and the `names`
    of its parameters. Parameters that require no gradient are left out.
    """
    groups: dict[tuple[float, bool, bool], dict[str, Any]] = {}
    for name, parameter in student.named_parameters():
        if not parameter.requires_grad:
            continue
        exempt = name.endswith(".bias") or parameter.ndim == 1
        exempt |= not decay_tokens and name.rsplit(".", 1)[-1] in TOKENS
        scale = rate_scale(student, name, layer_decay, patch_embed_scale)
        apart = freeze_by == "rate" and is_last_layer(name)
        group = groups.setdefault(
            (scale, not exempt, apart),
            {
                "params": [],
                "names": [],
                "rate_scale": scale,
                "decay": not exempt,
                "last_layer": apart,
                "weight_decay": 0.0,
            },
        )
        group["params"].append(parameter)
        group["names"].append(name)
    return sorted(groups.values(), key=lambda group: not group["decay"])


def is_last_layer(name: str) -> bool:
    """Whether a parameter is a head's prototypes."""
    return "last_layer" in name


def rate_scale(
    student: Any, name: str, layer_decay: float, patch_embed_scale: float = 1.0
) -> float:
    """What the rate of a student's parameter is multiplied by: 1 for heads and the backbone's last
    norm, `layer_decay` once for each step down from there (Bao et al. 2021, appendix; DINOv2,
    appendix B). The patch embedding's also by `patch_embed_scale`.
    """
    part, _, inner = name.partition(".")
    if part != "backbone":
        return 1.0
    backbone = student.backbone
    scale: float = layer_decay ** (backbone.num_blocks + 1 - backbone.depth_of(inner))
    return scale * patch_embed_scale if inner.startswith("patch_embed.") else scale


def clip_groups(student: nn.Module, by: ClipBy) -> list[list[nn.Parameter]]:
    """The trained parameters, those together whose gradients have a norm in common: all of them,
    those of each child of `student` (as DINOv2's sharded modules have), or each for itself (DINO).
    """
    groups: dict[str, list[nn.Parameter]] = {}
    for name, parameter in student.named_parameters():
        if parameter.requires_grad:
            key = {"global": "", "module": name.partition(".")[0], "parameter": name}[by]
            groups.setdefault(key, []).append(parameter)
    return list(groups.values())


def clip_gradients_(groups: Sequence[Sequence[Tensor]], limit: float) -> Float[Tensor, ""]:
    """Scale each group of gradients down to an L2 norm of `limit`, in place; returns the norm of
    all of them before that.

    More than one group changes the direction of the step; `limit` 0 bounds nothing. Nothing waits
    for the device.
    """
    filled = [list(group) for group in groups if group]
    norms = torch._foreach_norm([gradient for group in filled for gradient in group])
    stacked = torch.stack([norm.to(norms[0].dtype) for norm in norms])
    if limit > 0:
        parts = torch.split(stacked, [len(group) for group in filled])
        joint = torch.stack([torch.linalg.vector_norm(part) for part in parts])
        factors = (limit / (joint + 1e-6)).clamp(max=1.0)
        for group, factor in zip(filled, factors, strict=True):
            torch._foreach_mul_(group, factor)
    total: Tensor = torch.linalg.vector_norm(stacked)
    return total
