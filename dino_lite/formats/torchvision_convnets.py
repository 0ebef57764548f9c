"""torchvision's names of ResNets and ConvNeXts. timm, DINO, MoCo, solo-learn and many others have
its ResNet's names.
"""

from __future__ import annotations

from typing import Any

from dino_lite.backbones.convnet import ConvNet
from dino_lite.contracts import UserError
from dino_lite.formats.convnets import CONVNEXT, STAGES, Names, reads
from dino_lite.formats.owner import Owner, Read, Tensors

RESNET_NAMES = Names(
    (
        *(("conv1.", "stem.0."), ("bn1.", "stem.1."), ("maxpool.", "stem.3.")),
        *((f"layer{i + 1}.", f"stages.{i}.") for i in STAGES),
    )
)
# Of nn.Sequential(*list(resnet.children())[:-1]), as in lightly's examples.
_CHILDREN = Names(
    (
        *(("0.", "stem.0."), ("1.", "stem.1.")),
        *((f"{i + 4}.", f"stages.{i}.") for i in STAGES),
    )
)
_CONVNEXT = Names(
    (
        *(("features.0.0.", "stem.0."), ("features.0.1.", "stem.1."), ("classifier.0.", "norm.")),
        *((f"features.{2 * i + 1}.", f"stages.{i}.blocks.") for i in STAGES),
        *((f"features.{2 * i}.", f"stages.{i}.downsample.") for i in STAGES[1:]),
    ),
    (
        *((".block.0.", ".conv_dw."), (".block.2.", ".norm."), (".layer_scale", ".gamma")),
        *((".block.3.", ".mlp.fc1."), (".block.5.", ".mlp.fc2.")),
    ),
)
MODELS = (
    *("resnet18", "resnet34", "resnet50", "resnet101", "resnet152"),
    *("resnext50_32x4d", "resnext101_32x8d", "resnext101_64x4d"),
    *("wide_resnet50_2", "wide_resnet101_2"),
    *("convnext_tiny", "convnext_small", "convnext_base", "convnext_large"),
)


def _read_resnet(own: Tensors, about: dict[str, Any]) -> Read:
    timms = "architecture" in about and ("told_by" not in about or "pretrained_cfg" in about)
    owner = "timm ResNet" if timms else "torchvision ResNet"
    return reads(owner, "it has conv1 and layer1", RESNET_NAMES)(own, about)


def _read_children(own: Tensors, about: dict[str, Any]) -> Read | None:
    if "0.weight" not in own or "1.weight" not in own:
        return None
    return reads("torchvision ResNet", "it has a ResNet's children", _CHILDREN)(own, about)


TORCHVISION = (
    Owner("layer1.0.conv1.weight", _read_resnet),
    Owner("4.0.conv1.weight", _read_children),
    Owner(
        "features.1.0.block.0.weight",
        reads("torchvision ConvNeXt", "it has features and block", _CONVNEXT),
    ),
)


def convnet_for_torchvision(backbone: ConvNet) -> tuple[Tensors, dict[str, Any]]:
    """Weights by torchvision's names, without a classifier, and {"model": name of the function in
    torchvision.models that builds their network}. Raises UserError if there is none.
    """
    spec = backbone.spec
    plain = {"patch_size": 32, "in_chans": 3, "fields": 0}
    other = spec.keys() & {"widths", "depths", "norm_eps", "last_norm_eps"}
    if spec["name"] not in MODELS or spec["norm"] == "group" or other or spec != spec | plain:
        raise UserError(
            f"torchvision has no network like {spec['name']} with these settings: export it as "
            "format=onnx or format=torch_export."
        )
    weights = backbone.state_dict()
    if CONVNEXT not in weights:
        return RESNET_NAMES.write(weights), {"model": spec["name"]}
    written = _CONVNEXT.write(weights)
    scales = {n: v.reshape(-1, 1, 1) for n, v in written.items() if n.endswith("layer_scale")}
    return written | scales, {"model": spec["name"]}
