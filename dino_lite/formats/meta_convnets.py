"""The names of ConvNeXts in Meta's own programs: ConvNeXt, ConvNeXt V2 and DINOv3's hub."""

from __future__ import annotations

from typing import Any

from dino_lite.backbones.convnet import ConvNet
from dino_lite.formats.convnets import STAGES, Names, demand_plain, reads
from dino_lite.formats.owner import Owner, Read, Tensors

_NAMES = Names(
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
_LAST = f"norms.{STAGES[-1]}."  # DINOv3's other name of the same norm


def _read(own: Tensors, about: dict[str, Any]) -> Read:
    dinov3 = any(name.startswith(_LAST) for name in own)
    owner = "DINOv3 ConvNeXt" if dinov3 else "ConvNeXt (Meta)"
    if "norm.weight" not in own:
        own = {name.replace(_LAST, "norm."): value for name, value in own.items()}
    return reads(owner, "it has downsample_layers and dwconv", _NAMES)(own, about)


META_CONVNETS = (Owner("downsample_layers.0.0.weight", _read),)


def convnet_for_dinov3(backbone: ConvNet) -> Tensors:
    """Weights of a ConvNeXt by the names of DINOv3's hub. Raises UserError for others."""
    demand_plain(backbone, "convnext_tiny", "DINOv3's hub")
    weights = _NAMES.write(backbone.state_dict())
    weights |= {n: v.flatten(1) for n, v in weights.items() if ".pwconv" in n and v.ndim > 1}
    last = {f"{_LAST}{kind}": weights[f"norm.{kind}"] for kind in ("weight", "bias")}
    return weights | last
