"""Export format `hf`: a folder for AutoModel and AutoImageProcessor of transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

from safetensors.torch import save_file

from dino_lite.backbones.convnet import ConvNet
from dino_lite.backbones.rope import RoPEViT
from dino_lite.backbones.transformer import Transformer
from dino_lite.backbones.vit import ViT
from dino_lite.contracts import Backbone, UserError
from dino_lite.data.preprocessing import Preprocessing
from dino_lite.formats.format import Claim, Format, described
from dino_lite.formats.hugging_face import resamples_alike, write
from dino_lite.formats.opened import Opened
from dino_lite.formats.timm import Timm

_PILLOW = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3, "box": 4, "hamming": 5}
_LARGE_SQUARE = (4096, 4096)
_LOAD = """from transformers import AutoModel

model = AutoModel.from_pretrained(folder).eval()"""
_READ = """from PIL import Image
from transformers import AutoImageProcessor

processor = AutoImageProcessor.from_pretrained(folder)
image = Image.open("image.jpg").convert("{}")
pixels = processor(image, return_tensors="pt")["pixel_values"]"""


class HuggingFace(Format):
    """A ViTModel, Dinov2Model, Dinov2WithRegistersModel or DINOv3ViTModel, whichever computes the
    same as the backbone; for others the folder of format `timm`, which transformers 5 opens.

    If the class resamples learned positions by another rule than the backbone, those of the
    preprocessing's size are stored, and other sizes are not claimed.
    """

    name: ClassVar[str] = "hf"
    packages: ClassVar[tuple[str, ...]] = ("transformers",)
    library: ClassVar[str] = "transformers"

    def write(self, opened: Opened, folder: Path) -> list[Claim]:
        """Write config.json, model.safetensors and preprocessor_config.json; see `Format.write`."""
        backbone, how = opened.backbone, opened.preprocessing
        oblong = how.size[0] != how.size[1] and not how.squash and how.rule != "hugging_face"
        if not isinstance(backbone, ViT | RoPEViT) or how.border or oblong:
            return _through_timm(opened, folder)
        alike = resamples_alike(backbone)
        native = write(backbone, None if alike else how.size)
        if native is None:
            return _through_timm(opened, folder)
        weights, config = native
        config.setdefault("image_size", how.size[0] if how.size[0] == how.size[1] else [*how.size])
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        _save(folder / "config.json", config)
        _save(folder / "preprocessor_config.json", _processor(opened.for_others))
        more = "interpolate_pos_encoding=True" if alike and config["model_type"] == "vit" else ""
        return [Claim(_LOAD, _run(backbone, more), (how.size,), alike, read=_read(backbone))]


def _run(backbone: Backbone, more: str = "") -> str:
    """Lines that compute the tokens; `more` are keywords of the model's call."""
    call = f"output = model(pixel_values=pixels{more and f', {more}'})\n"
    if isinstance(backbone, Transformer):
        first = 1 + backbone.num_registers
        tokens = "output.last_hidden_state"
        return f"{call}cls, patches = {tokens}[:, 0], {tokens}[:, {first}:]"
    maps = "output.last_hidden_state"
    if isinstance(backbone, ConvNet) and backbone.spec["norm"] == "layer":
        maps = f"model.timm_model.head.norm({maps})"  # timm normalizes pooled features only
    return f"{call}cls, patches = output.pooler_output, {maps}.flatten(2).transpose(1, 2)"


def _processor(how: Preprocessing) -> dict[str, Any]:
    """The content of preprocessor_config.json, for versions 4 and 5."""
    rows, columns = how.always_resized().resized(*_LARGE_SQUARE)
    size = {"height": rows, "width": columns} if how.squash else {"shortest_edge": rows}
    return {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": len(how.mean) == 3,
        "do_resize": True,
        "size": size,
        "resample": _PILLOW[how.interpolation],
        "do_center_crop": True,
        "crop_size": dict(zip(("height", "width"), how.size, strict=True)),
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [*how.mean],
        "image_std": [*how.std],
    }


def _through_timm(opened: Opened, folder: Path) -> list[Claim]:
    """The folder of format `timm`, as transformers' TimmWrapperModel reads it."""
    backbone = opened.backbone
    small = isinstance(backbone, ConvNet) and backbone.spec["name"] == "resnet"
    if small or not isinstance(backbone, Transformer | ConvNet):
        raise UserError(
            f"format=hf cannot hold {described(backbone)}: neither transformers nor timm has a "
            "class for it; use format=[onnx] or format=[torch_export]."
        )
    try:
        claims = Timm().write(opened, folder)
    except UserError as error:
        raise UserError(str(error).replace("format=timm", "format=hf")) from error
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    # The wrapper makes the network from these alone, and passes num_classes itself.
    made_of = {"in_chans": backbone.in_chans} | config.get("model_args", {})
    config["model_args"] = {key: made_of[key] for key in made_of if key != "num_classes"}
    _save(folder / "config.json", config)
    run = _run(backbone)
    read = _read(backbone)
    return [claim._replace(load=_LOAD, run=run, read=read, packages=("timm",)) for claim in claims]


def _read(backbone: Backbone) -> str:
    """Lines that prepare an image; none for images that Pillow cannot open."""
    mode = {1: "L", 3: "RGB"}.get(backbone.in_chans)
    return _READ.format(mode) if mode else ""


def _save(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
