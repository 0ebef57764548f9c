"""Export format `timm`: a folder that `timm.create_model` and Hugging Face's transformers open."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from dino_lite.backbones.convnet import ConvNet
from dino_lite.backbones.rope import RoPEViT
from dino_lite.backbones.vit import ViT
from dino_lite.contracts import UserError
from dino_lite.formats.format import Claim, Format, described
from dino_lite.formats.opened import Opened
from dino_lite.formats.timm_convnets import convnet_for_timm
from dino_lite.formats.timm_names import published, same_at_any_size, write

_LOAD = 'import timm\n\nmodel = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()'
_READ = """from PIL import Image

transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
pixels = transform(Image.open("image.jpg").convert("{}"))[None]"""
_RUN_VIT = """tokens = model.forward_features(pixels)
cls, patches = tokens[:, 0], tokens[:, model.num_prefix_tokens :]"""
_RUN_CONVNET = """maps = model.forward_features(pixels)
cls, patches = model.forward_head(maps, pre_logits=True), {}.flatten(2).transpose(1, 2)"""


class Timm(Format):
    """`model.safetensors` by timm's names and timm's `config.json`.

    Exact at the size of training; at others where timm places patches as the backbone does: rotary
    positions, and learned ones with `position_offset` 0 and `position_antialias`.
    """

    name = "timm"
    packages = ("timm",)

    def write(self, opened: Opened, folder: Path) -> list[Claim]:
        """Write both files. Raises UserError for a compact backbone, the small convnet, and ViTs
        that timm lacks.
        """
        backbone, how = opened.backbone, opened.preprocessing
        if not isinstance(backbone, ViT | RoPEViT | ConvNet):
            raise UserError(
                f"format=timm cannot hold {described(backbone)}: timm has no class for it; choose "
                "format=onnx or format=torch_export."
            )
        try:
            any_size, run = same_at_any_size(backbone), _RUN_VIT
            if isinstance(backbone, ConvNet):
                weights, config = convnet_for_timm(backbone)
                norm = "model.head.norm(maps)" if backbone.spec["norm"] == "layer" else "maps"
                run = _RUN_CONVNET.format(norm)
            else:
                weights, config = write(backbone, None if any_size else how.size)
        except UserError as error:
            other = "" if "onnx" in str(error) else "; choose format=onnx or format=torch_export"
            raise UserError(f"format=timm: {str(error).removesuffix('.')}{other}.") from error
        weights = {name: value.float().clone().contiguous() for name, value in weights.items()}
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        about = config | {
            **{"num_classes": 0, "num_features": backbone.embed_dim},
            "pretrained_cfg": _pretrained_cfg(config["architecture"], opened),
        }
        (folder / "config.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
        mode = {1: "L", 3: "RGB"}.get(backbone.in_chans)
        read = _READ.format(mode) if mode else ""
        return [Claim(_LOAD, run, (how.size,), any_size, read=read)]


def _pretrained_cfg(name: str, opened: Opened) -> dict[str, Any]:
    """Preprocessing as timm says it, and what timm knows of the architecture: whether it is built
    for one image size, the layers to adapt to other channels and classes.
    """
    how, in_chans = opened.for_others.always_resized(), opened.backbone.in_chans
    mode = "squash" if how.squash else "border" if how.border else "center"
    known = ("fixed_input_size", "first_conv", "classifier")
    return {key: value for key, value in published(name).items() if key in known} | {
        **{"input_size": [in_chans, *how.size], "num_classes": 0},
        **{"mean": list(how.mean), "std": list(how.std), "interpolation": how.interpolation},
        **{"crop_pct": how.crop, "crop_mode": mode},
    }
