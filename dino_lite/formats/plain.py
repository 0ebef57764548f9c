"""The names that DINO, iBOT, DINOv2, MAE, lightly, solo-learn, timm's VisionTransformer and
dino_lite share.
"""

from __future__ import annotations

import re
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from dino_lite.backbones.rope import RoPEViT
from dino_lite.backbones.vit import ViT
from dino_lite.contracts import Backbone, UserError
from dino_lite.formats.dinov3 import SPEC
from dino_lite.formats.grids import grid_of
from dino_lite.formats.owner import Owner, Read, Tensors
from dino_lite.formats.timm_told import preprocessing_of

# What `checkpoint_layout=` may say.
Layout = Literal["dino", "ibot", "dinov2", "mae", "lightly", "solo-learn", "timm", "dino_lite"]


class _Rule(NamedTuple):
    """Whose weights, and how that one resamples positions."""

    owner: str
    position_offset: float
    position_antialias: bool


# For offset and antialiasing see dino_family, 1A.7 and 1B.5; an offset of 0 resamples by size.
LAYOUTS: dict[str, _Rule] = {
    "dino": _Rule("DINO", 0.1, False),
    "ibot": _Rule("iBOT", 0.1, False),
    "dinov2": _Rule("DINOv2", 0.1, False),
    "mae": _Rule("MAE", 0.0, False),
    "lightly": _Rule("lightly", 0.0, True),  # it and solo-learn wrap timm's models
    "solo-learn": _Rule("solo-learn", 0.0, True),
    "timm": _Rule("timm", 0.0, True),
    "dino_lite": _Rule("dino_lite", 0.0, True),
}
_DINOV2_REGISTERS = _Rule("DINOv2 with registers", 0.0, True)
_OF_TIMM = ("timm", "lightly", "solo-learn")  # some of timm's class tokens have no position
_ROTARY = (
    "it has our names of a ViT with rotary positions; their base is 100 unless "
    '{"rope_theta": BASE} in NAME.json next to the file says another'
)
_DECODER = re.compile(r"decoder_|mask_token$")


def read(own: Tensors, about: dict[str, Any]) -> Read:
    """Almost identical names, told apart by what else there is."""
    rotary = _is_rotary(own, about)
    layout, why = ("dino_lite", _ROTARY) if rotary else _layout(own, about)
    rule = LAYOUTS[layout]
    if layout == "dinov2" and "register_tokens" in own:
        rule = _DINOV2_REGISTERS
    weights: Tensors = {}
    left: list[str] = []
    decodes = any(name.startswith("decoder_") for name in own)
    for name, value in own.items():
        if decodes and _DECODER.match(name):  # the mask token has the decoder's width
            left.append(name)
            continue
        # DINOv2 groups blocks in chunks for FSDP; the second number is the index over all chunks.
        name = re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", name)
        name = name.replace(".mlp.w12.", ".mlp.fc1.").replace(".mlp.w3.", ".mlp.fc2.")
        ours = {"reg_token": "register_tokens", "masked_embed": "mask_token"}
        weights[ours.get(name, name)] = value
    spec: dict[str, Any] = {
        "position_offset": rule.position_offset,
        "position_antialias": rule.position_antialias,
    }
    if rotary:
        return Read(rule.owner, why, weights, left, SPEC)
    preprocessing, doubt = preprocessing_of(own, about) if layout == "timm" else (None, "")
    first = False if "reg_token" in own else None if layout in _OF_TIMM else True
    return Read(
        *(rule.owner, why + doubt, weights, left, spec),
        preprocessing=preprocessing,
        class_position=first,
    )


def _is_rotary(own: Tensors, about: dict[str, Any]) -> bool:
    """Whether it is our RoPEViT: registers by our name or biases of queries alone, no positions."""
    if "pos_embed" in own:
        return False
    if about.get("checkpoint_layout") == "dino_lite":
        return True
    names = {name.rpartition(".qkv.")[2] for name in own if ".attn.qkv." in name}
    return "q_bias" in names or ("register_tokens" in own and names == {"weight"})


def _layout(own: Tensors, about: dict[str, Any]) -> tuple[str, str]:
    """The key of `LAYOUTS`, and how it was told, from what is said, then names that only one owner
    has, then where the weights are in the file, then the positions.
    """
    prefix = about.get("prefix", "")
    grid = grid_of(own, about, class_position=False if "reg_token" in own else None)
    if told := about.get("checkpoint_layout"):
        if not isinstance(told, str) or told not in LAYOUTS:
            raise UserError(f"checkpoint_layout={told} is none of {', '.join(LAYOUTS)}.")
        return told, "checkpoint_layout says so"
    if "register_tokens" in own:
        return "dinov2", "it has register_tokens"
    if any(name.startswith("decoder_") for name in own):
        return "mae", "it has MAE's decoder"
    if "masked_embed" in own:
        return "ibot", "it has masked_embed"
    if "mask_token" in own or any(".mlp.w12." in name for name in own):
        return "dinov2", "it has a mask token or SwiGLU"
    if "architecture" in about:
        by = about.get("told_by", "the JSON beside it")
        return "timm", f"{by} names an architecture of timm"
    for found, layout in (
        (r"momentum_backbone\.", "solo-learn"),
        (r"(student|teacher)_backbone\.|(^|backbone\.)vit\.", "lightly"),
        (r"state_dict_ema\.", "timm"),
        (r"state_dict\.method\.", "dino_lite"),
    ):
        if match := re.search(found, prefix):
            return layout, f"its weights are below {match[0]}"
    if _are_sines(own.get("pos_embed")):
        return "mae", "its positions are fixed sines and cosines"
    if own.keys() & {"head.weight", "fc_norm.weight", "head_dist.weight"}:
        return "timm", "it has a classifier"
    if re.search(r"(^|\.)state_dict\.(.*\.)?backbone\.$", prefix):
        doubt = "of DINO's own ViT in such a module say checkpoint_layout=dino"
        return "solo-learn", f"it is in a Lightning module, as solo-learn's and lightly's; {doubt}"
    if "blocks.0.ls1.gamma" in own or (grid is not None and not grid.with_class):
        return "timm", "it has LayerScale, or no position of the class token"
    if grid is not None and grid.rows != grid.columns:
        return "timm", "its grid is not square"
    if re.search(r"(^|\.)(teacher|student)\.", prefix):
        return "dino", "it is the teacher or student of DINO's training"
    doubt = "as have timm's without a classifier: of one say checkpoint_layout=timm"
    return "dino", f"it has the names of DINO's released ViTs, {doubt}"


def _are_sines(positions: Tensor | None) -> bool:
    """Whether positions are zero for the class token and else the fixed ones of MAE and MoCo v3,
    quarters of sines and cosines of equal angles.
    """
    if positions is None or positions.shape[-1] % 4 or positions[:, 0].any():
        return False
    one, two, three, four = positions[:, 1:].double().square().chunk(4, dim=-1)
    ones = torch.stack([one + two, three + four])
    return torch.allclose(ones, torch.ones_like(ones), atol=1e-2)


def check_layout(owner: str, about: dict[str, Any]) -> None:
    """Raise UserError if `about` says a layout, and the names are not those that several share."""
    told = about.get("checkpoint_layout")
    ours = {rule.owner for rule in LAYOUTS.values()} | {_DINOV2_REGISTERS.owner}
    if told is not None and owner not in ours:
        raise UserError(
            f"checkpoint_layout={told} is for names that several programs use, and these are "
            f"{owner}'s: leave it out."
        )


def write_dino(backbone: Backbone) -> Tensors:
    """Weights by the names of DINO's hub. Raises UserError if its ViTs differ from `backbone`."""
    weights = _of_vit(backbone, "DINO")
    odd = [n for n in weights if n == "register_tokens" or ".ls" in n or "_norm." in n]
    if odd or any(part.gated for part in _mlps(backbone)):
        raise UserError(f"DINO's ViTs have no {odd[0] if odd else 'gated MLP'}: choose DINOv2's.")
    return {name: value for name, value in weights.items() if name != "mask_token"}


def write_dinov2(backbone: Backbone) -> Tensors:
    """Weights by the names of DINOv2's hub, whose ViTs always have a mask token. Raises UserError
    if they differ from `backbone`.
    """
    weights = _of_vit(backbone, "DINOv2")
    if "blocks.0.ls1.gamma" not in weights or "blocks.0.attn.q_norm.weight" in weights:
        raise UserError("DINOv2's ViTs have LayerScale and no norms of queries: choose timm's.")
    weights.setdefault("mask_token", torch.zeros(1, backbone.embed_dim))
    if not any(part.gated for part in _mlps(backbone)):
        return weights
    named = {".mlp.fc1.": ".mlp.w12.", ".mlp.fc2.": ".mlp.w3."}
    for ours, theirs in named.items():
        weights = {name.replace(ours, theirs): value for name, value in weights.items()}
    return weights


def _of_vit(backbone: Backbone, owner: str) -> Tensors:
    if not isinstance(backbone, ViT):
        other = "DINOv3's" if isinstance(backbone, RoPEViT) else "timm's"
        raise UserError(f"{owner} has no {type(backbone).__name__}: choose {other} names.")
    return dict(backbone.state_dict())


def _mlps(backbone: Any) -> list[Any]:
    return [block.mlp for block in backbone.blocks]


PLAIN = Owner("cls_token", read)
