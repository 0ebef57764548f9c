"""ResNets and ConvNeXts of others: every owner's file gives its owner's features, both ways."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import timm
import torch
import torchvision
import transformers
from safetensors.torch import save_file
from timm.models.resnet import BasicBlock, Bottleneck
from torch import Tensor, nn
from torchvision.models.convnext import CNBlockConfig

from dino_lite.backbones.convnet import ConvNet
from dino_lite.contracts import UserError
from dino_lite.formats.hugging_face_convnets import convnet_for_hugging_face
from dino_lite.formats.meta_convnets import convnet_for_dinov3
from dino_lite.formats.timm_convnets import convnet_for_timm
from dino_lite.formats.torchvision_names import convnet_for_torchvision
from dino_lite.formats.weights import load_pretrained, open_timm, open_weights
from test_importers import pretend_download

Weights = dict[str, Tensor]
Pair = tuple[Tensor, Tensor]
SIZES = ((64, 64), (96, 96), (64, 96))
WIDTHS, DEPTHS = [8, 16, 24, 32], [1, 2, 1, 1]
HF = {"hidden_sizes": WIDTHS, "depths": DEPTHS}
# A bottleneck's stages are four times as wide as the channels inside.
RESNET = {"hidden_sizes": [4 * width for width in WIDTHS], "depths": DEPTHS}


def randomize(model: nn.Module) -> nn.Module:
    """Generic weights and statistics in float64, in eval mode: no two layers are alike."""
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                noise = torch.randn(value.shape, generator=draw)
                scale = 0.7 / max(1, value[0].numel()) ** 0.5 if value.ndim > 1 else 0.3
                one = "var" in name or value.ndim == 1 and name.endswith(("weight", "gamma"))
                value.copy_(1 + 0.3 * noise.abs() if one else scale * noise)
    return model.double().eval()


def pooled(model: Any, images: Tensor, norm: Any = None) -> Pair:
    """Class token and patches of a map "n C H W" before `norm` of channels last."""
    norm = norm or nn.Identity()
    cells = model(images).permute(0, 2, 3, 1)
    return norm(cells.mean((1, 2))), norm(cells).flatten(1, 2)


def by_torchvision(model: Any, images: Tensor) -> Pair:
    if hasattr(model, "features"):
        norm = model.classifier[0]
        cells = model.features(images)
        cls = norm(model.avgpool(cells)).flatten(1)
        return cls, norm(cells).flatten(2).transpose(1, 2)
    children = nn.Sequential(*list(model.children())[:-1])
    cells = children[:-1](images)
    return children(images).flatten(1), cells.flatten(2).transpose(1, 2)


def by_timm(model: Any, images: Tensor) -> Pair:
    cells = model.forward_features(images)
    cls = model.forward_head(cells, pre_logits=True)
    cells = getattr(getattr(model, "head", None), "norm", nn.Identity())(cells)
    return cls, cells.flatten(2).transpose(1, 2)


def by_transformers(model: Any, images: Tensor) -> Pair:
    model = getattr(model, model.base_model_prefix, model) if hasattr(model, "classifier") else model
    found = model(images)
    last = found.last_hidden_state
    if last.ndim == 3:  # DINOv3's
        return found.pooler_output, last[:, 1:]
    cells = last.permute(0, 2, 3, 1)
    cells = model.layernorm(cells) if hasattr(model, "layernorm") else cells
    return found.pooler_output.flatten(1), cells.flatten(1, 2)


class Source(NamedTuple):
    """A model of an owner's library, its own features, and how its file is called."""

    make: Callable[[], nn.Module]
    features: Callable[[Any, Tensor], Pair]
    owner: str
    spec: dict[str, Any]
    folder: Callable[[], dict[str, Any]] | None = None  # config.json of a timm folder
    unused: tuple[str, ...] = ()


def hf(kind: str, model: str = "Model", **settings: Any) -> Callable[[], nn.Module]:
    """A model of transformers."""
    config = getattr(transformers, f"{kind}Config")(**settings)
    return lambda: getattr(transformers, f"{kind}{model}")(config)


def torchvision_convnext() -> nn.Module:
    ends = [*WIDTHS[1:], None]
    blocks = [CNBlockConfig(*each) for each in zip(WIDTHS, ends, DEPTHS, strict=True)]
    return torchvision.models.convnext.ConvNeXt(blocks, num_classes=3)


def timm_model(name: str, **settings: Any) -> Callable[[], nn.Module]:
    return lambda: timm.create_model(name, num_classes=3, **settings)


TIMM = {"dims": WIDTHS, "depths": DEPTHS}
SOURCES = {
    "torchvision resnet18": Source(
        torchvision.models.resnet18,
        by_torchvision,
        "torchvision ResNet",
        {"name": "resnet18"},
        unused=("fc.weight", "fc.bias"),
    ),
    "torchvision convnext": Source(
        torchvision_convnext,
        by_torchvision,
        "torchvision ConvNeXt",
        {"name": "convnext_tiny", "widths": WIDTHS, "depths": DEPTHS},
        unused=("classifier.2.weight", "classifier.2.bias"),
    ),
    "timm resnet26": Source(
        timm_model("resnet26", layers=DEPTHS, channels=WIDTHS),
        by_timm,
        "torchvision ResNet",
        {"name": "resnet50", "widths": [4 * width for width in WIDTHS], "depths": DEPTHS},
        unused=("fc.weight", "fc.bias"),
    ),
    "timm resnet10t": Source(  # deep stem, average pooling
        timm_model("resnet10t"),
        by_timm,
        "torchvision ResNet",
        {"name": "resnet10t"},
        unused=("fc.weight", "fc.bias"),
    ),
    "timm resnetblur18": Source(  # told apart by its config.json alone
        timm_model("resnetblur18"),
        by_timm,
        "timm ResNet",
        {"name": "resnetblur18"},
        lambda: {"architecture": "resnetblur18"},
        unused=("fc.weight", "fc.bias"),
    ),
    "timm convnext": Source(
        timm_model("convnext_tiny", norm_eps=1e-3, **TIMM),
        by_timm,
        "timm ConvNeXt",
        {"name": "convnext_tiny", "widths": WIDTHS, "depths": DEPTHS, "norm_eps": 1e-3},
        lambda: {"architecture": "convnext_tiny", "model_args": TIMM | {"norm_eps": 1e-3}},
        unused=("head.fc.weight", "head.fc.bias"),
    ),
    "timm convnextv2": Source(
        timm_model("convnextv2_nano", **TIMM),
        by_timm,
        "timm ConvNeXt",
        {"name": "convnextv2_tiny", "widths": WIDTHS, "depths": DEPTHS},
        unused=("head.fc.weight", "head.fc.bias"),
    ),
    "timm convnext_atto_ols": Source(
        timm_model("convnext_atto_ols"),
        by_timm,
        "timm ConvNeXt",
        {"name": "convnext_atto_ols"},
        unused=("head.fc.weight", "head.fc.bias"),
    ),
    "ResNetModel": Source(
        hf("ResNet", **RESNET),
        by_transformers,
        "Hugging Face ResNet",
        {"name": "resnet50", "widths": RESNET["hidden_sizes"], "depths": DEPTHS},
    ),
    "ResNetForImageClassification": Source(
        hf("ResNet", "ForImageClassification", layer_type="basic", **HF),
        by_transformers,
        "Hugging Face ResNet",
        {"name": "resnet18", "widths": WIDTHS, "depths": DEPTHS},
        unused=("classifier.1.weight", "classifier.1.bias"),
    ),
    "ConvNextModel": Source(
        hf("ConvNext", layer_norm_eps=1e-2, **HF),
        by_transformers,
        "Hugging Face ConvNext",
        {"name": "convnext_tiny", "widths": WIDTHS, "depths": DEPTHS, "last_norm_eps": 1e-2},
    ),
    "ConvNextV2ForImageClassification": Source(
        hf("ConvNextV2", "ForImageClassification", **HF),
        by_transformers,
        "Hugging Face ConvNext",
        {"name": "convnextv2_tiny", "widths": WIDTHS, "depths": DEPTHS, "last_norm_eps": 1e-12},
        unused=("classifier.weight", "classifier.bias"),
    ),
    "DINOv3ConvNextModel": Source(
        hf("DINOv3ConvNext", layer_norm_eps=1e-2, **HF),
        by_transformers,
        "Hugging Face DINOv3 ConvNext",
        {"name": "convnext_tiny", "widths": WIDTHS, "depths": DEPTHS, "norm_eps": 1e-2},
    ),
}


def saved(source: Source, model: Any, folder: Path) -> Path:
    """As its owner saves it: a folder with config.json, or a file of the state alone."""
    if isinstance(model, transformers.PreTrainedModel):
        model.save_pretrained(folder)
    elif source.folder is None:
        torch.save({"model": model.state_dict(), "epoch": 3}, folder / "weights.pth")
        return folder / "weights.pth"
    else:
        save_file(model.state_dict(), folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(source.folder()))
    return folder


def agree(backbone: ConvNet, wanted: Callable[[Tensor], Pair]) -> None:
    """Class token and patches to 1e-6 in float64, at the native and two other sizes."""
    backbone.double().eval()
    for size in SIZES:
        images = torch.randn(2, 3, *size, dtype=torch.float64)
        with torch.no_grad():
            tokens, (cls, patches) = backbone(images), wanted(images)
        assert cls.std() > 1e-3
        torch.testing.assert_close(tokens.cls, cls, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(tokens.patches, patches, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", SOURCES)
def test_a_file_gives_its_owners_features(name: str, tmp_path: Path) -> None:
    """The network is read from names and shapes; the classifier is left unused, by name."""
    source = SOURCES[name]
    model = randomize(source.make())
    opened = open_weights(saved(source, model, tmp_path))
    assert opened.fit is not None
    assert opened.fit.layout == source.owner
    own = {key: value for key, value in opened.backbone.spec.items() if key in source.spec}
    assert own == source.spec
    assert {unused.removeprefix("model.") for unused in opened.fit.unused} == {*source.unused}
    assert opened.fit.adapted == []
    assert opened.image_size == 224
    assert isinstance(opened.backbone, ConvNet)
    agree(opened.backbone, lambda images: source.features(model, images))
