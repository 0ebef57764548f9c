"""timm's names of ConvNeXts, and its configuration of convnets; its ResNets have torchvision's."""

from __future__ import annotations

from typing import Any

from dino_lite.backbones.convnet import ConvNet
from dino_lite.contracts import UserError
from dino_lite.formats.convnets import CONVNEXT, Names, reads
from dino_lite.formats.owner import Owner, Read, Tensors
from dino_lite.formats.torchvision_convnets import RESNET_NAMES

_SHARED = (("stem.", "stem."), ("stages.", "stages."))
_CONVNEXT = Names((("head.norm.", "norm."), *_SHARED))
_OURS = Names((("norm.", "norm."), *_SHARED))


def _read(own: Tensors, about: dict[str, Any]) -> Read:
    """Names equal ours, but for the last norm's."""
    if "norm.weight" in own:
        return reads("dino_lite", "it has our names of a ConvNeXt", _OURS)(own, about)
    return reads("timm ConvNeXt", "its blocks have conv_dw", _CONVNEXT)(own, about)


TIMM_CONVNETS = (Owner(CONVNEXT, _read),)


def convnet_for_timm(backbone: ConvNet) -> tuple[Tensors, dict[str, Any]]:
    """Weights by timm's names, and "architecture" and "model_args" of its config.json.

    timm has one epsilon for all norms, so `last_norm_eps` is lost. Raises UserError if timm has no
    such network.
    """
    spec, name = backbone.spec, backbone.spec["name"]
    for other, what in (
        (name == "resnet", "small convnets given by widths"),
        (spec["fields"], f"pyramids as class token (backbone.fields={spec['fields']})"),
        (spec["norm"] == "group", "ResNets with group normalization of 16 channels a group"),
    ):
        if other:
            raise UserError(f"timm has no {what}: export it as format=onnx or format=torch_export.")
    weights, layer = backbone.state_dict(), spec["norm"] == "layer"
    args: dict[str, Any] = {"norm_eps": spec.get("norm_eps")}
    if spec["in_chans"] != 3:
        args["in_chans"] = spec["in_chans"]
    if spec["patch_size"] != 32:
        args["output_stride"] = spec["patch_size"]
    if "depths" in spec:
        args["depths" if layer else "layers"] = spec["depths"]
    if "widths" in spec and layer:
        args["dims"] = spec["widths"]
    elif "widths" in spec:
        stages: Any = zip(spec["widths"], backbone.stages, strict=True)
        args["channels"] = [width // stage[0].expansion for width, stage in stages]
    if name.endswith("_mlp"):
        args["head_hidden_size"] = 0  # no layer between pooling and classifier
    told = {key: value for key, value in args.items() if value is not None}
    names = _CONVNEXT if CONVNEXT in weights else RESNET_NAMES
    return names.write(weights), {"architecture": name.partition(".")[0], "model_args": told}
