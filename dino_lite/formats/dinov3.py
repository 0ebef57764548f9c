"""The names of DINOv3's hub, whose ConvNeXts are called as in Meta's ConvNeXt and ConvNeXt V2."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dino_lite.backbones.convnet import ConvNet
from dino_lite.backbones.rope import RoPEViT
from dino_lite.contracts import Backbone, UserError
from dino_lite.formats.convnets import STAGES, Names, demand_plain, reads
from dino_lite.formats.owner import Owner, Read, Tensors, gated_mlp

_PERIODS = "rope_embed.periods"
_BASE = 100.0  # of all DINOv3 models
# Not part of the backbone: the norm of local crops in training, heads of EUPE's distillation.
_LEFT = ("local_cls_norm.", "projectors.")
SPEC: dict[str, Any] = {"kind": "rope", "norm_eps": 1e-5}
_CONVNEXT = Names(
    (
        *(("downsample_layers.0.", "stem."), ("norm.", "norm.")),
        *((f"downsample_layers.{i}.", f"stages.{i}.downsample.") for i in STAGES[1:]),
        *((f"stages.{i}.", f"stages.{i}.blocks.") for i in STAGES),
    ),
    (
        *((".dwconv.", ".conv_dw."), (".pwconv1.", ".mlp.fc1."), (".pwconv2.", ".mlp.fc2.")),
        *((".grn.gamma", ".mlp.grn.weight"), (".grn.beta", ".mlp.grn.bias")),
    ),
)
_LAST = f"norms.{STAGES[-1]}."  # the hub's other name of a ConvNeXt's last norm


def read(own: Tensors, about: dict[str, Any]) -> Read | None:
    """Keys have a (masked) bias; gate and value of the MLP are separate layers."""
    if "pos_embed" in own or not ("storage_tokens" in own or _PERIODS in own):
        return None
    weights: Tensors = {}
    left, periods, spec = [], own.get(_PERIODS), SPEC
    base = None if periods is None else _base_of(periods)
    if base is not None:
        spec = SPEC | {"rope_base": base}
    for name, value in own.items():
        masked = name.endswith("qkv.bias_mask") or (name == _PERIODS and base is not None)
        if masked or name.startswith(_LEFT):
            left.append(name)
        elif name.endswith("qkv.bias"):
            mask = own.get(f"{name}_mask")
            query, key, bias = (value if mask is None else value * mask.to(value)).chunk(3)
            weights |= {f"{name[:-4]}q_bias": query, f"{name[:-4]}v_bias": bias}
            if key.any():
                weights[f"{name[:-4]}k_bias"] = key
        else:
            weights["register_tokens" if name == "storage_tokens" else name] = value
    num_heads = None if periods is None else own["cls_token"].shape[-1] // (4 * len(periods))
    weights = gated_mlp(weights, "w1", "w2", "w3")
    return Read("DINOv3", "it has RoPE's periods or storage tokens", weights, left, spec, num_heads)


def _base_of(periods: Tensor) -> float | None:
    """RoPE's base, of which `periods` are powers of evenly spaced exponents from 0 to below 1; None
    if they are not. Files round them to bfloat16, so a base of two digits is preferred.
    """
    num, tolerance = len(periods), 2**-7 if _is_rounded(periods) else 1e-5
    exact = float(periods[-1].double()) ** (num / max(1, num - 1)) if num > 1 else _BASE
    exponents = torch.arange(num, dtype=torch.float64) / num
    for base in (_BASE, float(f"{exact:.1e}"), exact):
        if torch.allclose(periods.double(), base**exponents, rtol=tolerance):
            return base
    return None


def _is_rounded(periods: Tensor) -> bool:
    return torch.equal(periods.bfloat16().to(periods.dtype), periods)


def rotation_of(about: dict[str, Any], told: dict[str, Any]) -> dict[str, Any]:
    """Keywords of a RoPEViT's rotations: the base and the normalization of coordinates, from the
    weights (`told`), else from `about` by the keys of Hugging Face, of DINOv3's configuration or of
    timm.
    """
    about = about | (about.get("student") or {}) | (about.get("model_args") or {})
    rope = about.get("rope_parameters") or {}
    bases = (
        *(about.get("rope_theta"), rope.get("rope_theta")),
        *(about.get("pos_embed_rope_base"), about.get("rope_temperature")),
    )
    base = told.get("rope_base") or next((each for each in bases if each), _BASE)
    names = ("pos_embed_rope_normalize_coords", "rope_normalize_coords", "normalize_coords")
    normalizer = next((about[name] for name in names if about.get(name)), "separate")
    return {"rope_base": base} | (
        {} if normalizer == "separate" else {"rope_normalize_coords": normalizer}
    )


def write(backbone: Backbone) -> tuple[Tensors, dict[str, Any]]:
    """Weights by the names of DINOv3's hub, and what its configuration says of the rotations.
    Raises UserError if its ViTs differ from `backbone`.
    """
    if not isinstance(backbone, RoPEViT) or not isinstance(backbone.register_tokens, Tensor):
        raise UserError("DINOv3's ViTs have rotary positions and registers: choose timm's names.")
    if "blocks.0.attn.q_norm.weight" in backbone.state_dict():
        raise UserError("DINOv3's ViTs have no norms of queries: choose timm's names.")
    gated = backbone.blocks[0].mlp.gated
    found: Tensors = {"mask_token": torch.zeros(1, backbone.embed_dim)}
    for name, value in backbone.state_dict().items():
        stem, first, kind = name.partition(".mlp.fc1.")
        if gated and first:
            found[f"{stem}.mlp.w1.{kind}"], found[f"{stem}.mlp.w2.{kind}"] = value.chunk(2)
        elif not name.endswith(("qkv.q_bias", "qkv.v_bias")):
            name = name.replace(".mlp.fc2.", ".mlp.w3.") if gated else name
            found["storage_tokens" if name == "register_tokens" else name] = value
    for i, block in enumerate(backbone.blocks):
        if (bias := block.attn.qkv.bias) is not None:
            masked = torch.ones_like(bias)
            if not isinstance(block.attn.qkv, torch.nn.Linear):
                masked.chunk(3)[1].zero_()
            name = f"blocks.{i}.attn.qkv.bias"
            found |= {name: bias.detach(), f"{name}_mask": masked}
    own = backbone.positions
    exponents = torch.arange(own.width // 4, dtype=torch.float32) * 4 / own.width
    found[_PERIODS] = own.base**exponents
    config = {"base": own.base, "normalize_coords": own.normalizer}
    return found, {f"pos_embed_rope_{key}": value for key, value in config.items()}


def _read_convnext(own: Tensors, about: dict[str, Any]) -> Read:
    """Also ConvNeXt's and ConvNeXt V2's own names, which are the same."""
    dinov3 = any(name.startswith(_LAST) for name in own)
    owner = "DINOv3 ConvNeXt" if dinov3 else "ConvNeXt (Meta)"
    if "norm.weight" not in own:
        own = {name.replace(_LAST, "norm."): value for name, value in own.items()}
    return reads(owner, "it has downsample_layers and dwconv", _CONVNEXT)(own, about)


def convnet_for_dinov3(backbone: ConvNet) -> Tensors:
    """Weights of a ConvNeXt by the names of DINOv3's hub. Raises UserError for others."""
    demand_plain(backbone, "convnext_tiny", "DINOv3's hub")
    weights = _CONVNEXT.write(backbone.state_dict())
    weights |= {n: v.flatten(1) for n, v in weights.items() if ".pwconv" in n and v.ndim > 1}
    last = {f"{_LAST}{kind}": weights[f"norm.{kind}"] for kind in ("weight", "bias")}
    return weights | last


DINOV3 = Owner("cls_token", read)
META_CONVNEXT = Owner("downsample_layers.0.0.weight", _read_convnext)
