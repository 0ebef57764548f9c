"""The names of ResNet, ConvNext, ConvNextV2 and DINOv3ConvNext in Hugging Face's transformers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dino_lite.backbones.convnet import ConvNet
from dino_lite.contracts import UserError
from dino_lite.formats.convnets import CONVNEXT, EPS, STAGES, Names, demand_plain, reads
from dino_lite.formats.owner import Owner, Read, Tensors

_RESNET = Names(
    (
        ("embedder.embedder.convolution.", "stem.0."),
        ("embedder.embedder.normalization.", "stem.1."),
        *((f"encoder.stages.{i}.layers.", f"stages.{i}.") for i in STAGES),
    ),
    (
        (".shortcut.convolution.", ".downsample.0."),
        (".shortcut.normalization.", ".downsample.1."),
        *((f".layer.{i}.convolution.", f".conv{i + 1}.") for i in range(3)),
        *((f".layer.{i}.normalization.", f".bn{i + 1}.") for i in range(3)),
    ),
)
_CONVNEXT = Names(
    (
        ("embeddings.patch_embeddings.", "stem.0."),
        *(("embeddings.layernorm.", "stem.1."), ("layernorm.", "norm.")),
        *((f"encoder.stages.{i}.downsampling_layer.", f"stages.{i}.downsample.") for i in STAGES),
        *((f"encoder.stages.{i}.layers.", f"stages.{i}.blocks.") for i in STAGES),
    ),
    (
        *((".dwconv.", ".conv_dw."), (".layernorm.", ".norm."), (".grn.", ".mlp.grn.")),
        *((".pwconv1.", ".mlp.fc1."), (".pwconv2.", ".mlp.fc2.")),
        (".layer_scale_parameter", ".gamma"),
    ),
)
_DINOV3 = Names(
    (
        ("layer_norm.", "norm."),
        *(
            (f"{model}stages.{i}.{theirs}.", ours)
            for model in ("model.", "")  # of transformers 5, and before
            for i in STAGES
            for theirs, ours in (
                ("downsample_layers", f"stages.{i}.downsample." if i else "stem."),
                ("layers", f"stages.{i}.blocks."),
            )
        ),
    ),
    (
        *((".depthwise_conv.", ".conv_dw."), (".layer_norm.", ".norm.")),
        *((".pointwise_conv1.", ".mlp.fc1."), (".pointwise_conv2.", ".mlp.fc2.")),
    ),
)


def _reads(
    owner: str, why: str, names: Names, act: str, eps: dict[str, float]
) -> Callable[[Tensors, dict[str, Any]], Read]:
    """A reader that takes the epsilon of norms, by its key in our spec, from `about` too."""

    def read(own: Tensors, about: dict[str, Any]) -> Read:
        usual = {"hidden_act": act, "downsample_in_bottleneck": False}
        usual["downsample_in_first_stage"] = False
        other = [f"{key}={about[key]}" for key in usual if about.get(key, usual[key]) != usual[key]]
        if other:
            raise UserError(
                f"the config.json beside it says {' and '.join(other)}, which timm's networks "
                "cannot have: use it with transformers."
            )
        found = reads(owner, why, names)(own, about)
        told = {key: about.get("layer_norm_eps", value) for key, value in eps.items()}
        other_eps = {key: value for key, value in told.items() if value != EPS}
        return found._replace(spec=found.spec | other_eps)

    return read


# Only the last norm's epsilon is configurable in ConvNext and ConvNextV2; others have 1e-6.
_read_convnext = _reads(
    "Hugging Face ConvNext", "it has dwconv", _CONVNEXT, "gelu", {"last_norm_eps": 1e-12}
)
_read_dinov3 = _reads(
    "Hugging Face DINOv3 ConvNext", "it has depthwise_conv", _DINOV3, "gelu", {"norm_eps": 1e-6}
)
HUGGING_FACE_CONVNETS = (
    Owner(
        "encoder.stages.0.layers.0.layer.0.convolution.weight",
        _reads("Hugging Face ResNet", "it has convolution and shortcut", _RESNET, "relu", {}),
    ),
    Owner("encoder.stages.0.layers.0.dwconv.weight", _read_convnext),
    Owner("model.stages.0.layers.0.depthwise_conv.weight", _read_dinov3),
    Owner("stages.0.layers.0.depthwise_conv.weight", _read_dinov3),
)


def convnet_for_hugging_face(backbone: ConvNet) -> tuple[Tensors, dict[str, Any]]:
    """Weights by the names of ResNetModel, ConvNextModel or ConvNextV2Model, and their config.json.

    The pooled output is our class token; our patches of a ConvNeXt are the model's last hidden
    state after its `layernorm`. Raises UserError if there is no such class.
    """
    weights, spec = backbone.state_dict(), backbone.spec
    grn = any(name.endswith(".mlp.grn.weight") for name in weights)
    block = "bottleneck" if "stages.0.0.conv3.weight" in weights else "basic"
    base = {"bottleneck": "resnet50", "basic": "resnet18"}[block]
    if CONVNEXT in weights:
        base = "convnextv2_tiny" if grn else "convnext_tiny"
    sizes = demand_plain(backbone, base, "Hugging Face's transformers")
    config = {"num_channels": spec["in_chans"], "depths": sizes["depths"]}
    config |= {"hidden_sizes": sizes["widths"]}
    if CONVNEXT not in weights:
        own = {"model_type": "resnet", "architectures": ["ResNetModel"], "layer_type": block}
        return _RESNET.write(weights), config | own
    written = _CONVNEXT.write(weights)
    for name, value in written.items():
        if ".pwconv" in name:
            written[name] = value.flatten(1) if value.ndim > 1 else value
        elif ".grn." in name:
            written[name] = value.reshape(1, 1, 1, -1)
    last: Any = backbone.norm
    own = {"model_type": "convnextv2" if grn else "convnext", "layer_norm_eps": last.eps}
    return written, config | own | {"architectures": [f"ConvNext{'V2' * grn}Model"]}
