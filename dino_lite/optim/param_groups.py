"""Parameter groups (weight decay, learning-rate scale) and gradient clipping."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

# Learned tokens and positions are inputs, not weights, and need no weight decay; the references
# decay them nevertheless.
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
    """Parameter groups for an optimizer, those with weight decay first. Biases and one-dimensional
    parameters never decay; parameters that require no gradient are left out.

    `student` has its backbone as `.backbone`. With `decay_tokens`, learned tokens, positions and
    the norms of prototypes decay too, as in DINO. For `layer_decay` and `patch_embed_scale` see
    `rate_scale`. `freeze_by="rate"` puts last layers into separate groups, whose rate `Step` can
    set to 0. Each group has `rate_scale` (factor of the learning rate), `decay` (whether the
    weight-decay schedule applies), `last_layer` (whether it is such a separate group) and `names`
    (of its parameters).
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


def groups_of_students(
    students: nn.ModuleDict, scales: Mapping[str, float], **settings: Any
) -> list[dict[str, Any]]:
    """`param_groups` of each student, its learning rate multiplied by its one of `scales`."""
    return [
        group
        | {
            "names": [f"{name}.{each}" for each in group["names"]],
            "rate_scale": group["rate_scale"] * scales[name],
        }
        for name, student in students.items()
        for group in param_groups(student, **settings)
    ]


def is_last_layer(name: str) -> bool:
    """Whether the parameter `name` belongs to the prototypes of a head."""
    return "last_layer" in name


def rate_scale(
    student: Any, name: str, layer_decay: float, patch_embed_scale: float = 1.0
) -> float:
    """Factor of a parameter's learning rate: 1 for heads and the backbone's last norm, times
    `layer_decay` for each layer below (Bao et al. 2021, appendix; DINOv2, appendix B), and times
    `patch_embed_scale` for the patch embedding.
    """
    part, _, inner = name.partition(".")
    if part != "backbone":
        return 1.0
    backbone = student.backbone
    scale: float = layer_decay ** (backbone.num_blocks + 1 - backbone.depth_of(inner))
    return scale * patch_embed_scale if inner.startswith("patch_embed.") else scale


def clip_groups(student: nn.Module, by: ClipBy) -> list[list[nn.Parameter]]:
    """Trained parameters, grouped by those whose gradients are clipped by a joint norm: all
    ("global"), each child of `student` ("module", like DINOv2's sharded modules), or each parameter
    ("parameter", DINO).
    """
    groups: dict[str, list[nn.Parameter]] = {}
    for name, parameter in student.named_parameters():
        if parameter.requires_grad:
            key = {"global": "", "module": name.partition(".")[0], "parameter": name}[by]
            groups.setdefault(key, []).append(parameter)
    return list(groups.values())


def clip_gradients_(groups: Sequence[Sequence[Tensor]], limit: float) -> Float[Tensor, ""]:
    """Clip each group of gradients to an L2 norm of at most `limit`, in place; return the norm of
    all gradients before clipping.

    With more than one group, clipping changes the direction of the step. `limit=0` disables
    clipping. Does not synchronize with the device.
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
