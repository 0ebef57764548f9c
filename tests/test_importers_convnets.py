"""ResNets and ConvNeXts of others: every owner's file gives its owner's features, both ways."""

from __future__ import annotations

import functools
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
from timm.models.convnext import checkpoint_filter_fn
from torch import Tensor, nn
from torchvision.models.convnext import CNBlockConfig

from dino_lite.backbones.compact import Compact
from dino_lite.backbones.convnet import ConvNet
from dino_lite.config import compose
from dino_lite.contracts import UserError
from dino_lite.formats.convnets import convnet_spec
from dino_lite.formats.dinov3 import convnet_for_dinov3
from dino_lite.formats.hugging_face_convnets import convnet_for_hugging_face
from dino_lite.formats.owner import Read
from dino_lite.formats.timm_convnets import convnet_for_timm
from dino_lite.formats.torchvision_convnets import convnet_for_torchvision
from dino_lite.formats.weights import load_pretrained, open_timm, open_weights
from dino_lite.planning.checks import check_values
from dino_lite.planning.plan import plan
from dino_lite.runs.begin import begin_config, build_method
from dino_lite.runs.checkpoint import find_checkpoint, open_backbone
from test_conf import facts
from test_importers import pretend_download
from tiny import exported

Weights = dict[str, Tensor]
Pair = tuple[Tensor, Tensor]
SIZES = ((64, 64), (32, 32), (64, 96))
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
                one = "var" in name or (value.ndim == 1 and name.endswith(("weight", "gamma")))
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
    model = (
        getattr(model, model.base_model_prefix, model) if hasattr(model, "classifier") else model
    )
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
    config: dict[str, Any] | None = None  # config.json of a timm folder
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
    "torchvision resnet": Source(
        lambda: torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1] * 4),
        by_torchvision,
        "torchvision ResNet",
        {"name": "resnet18", "widths": [64, 128, 256, 512], "depths": [1] * 4},
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
        timm_model("resnetblur18", layers=DEPTHS, channels=WIDTHS),
        by_timm,
        "timm ResNet",
        {"name": "resnetblur18", "widths": WIDTHS, "depths": DEPTHS},
        {"architecture": "resnetblur18", "model_args": {"channels": WIDTHS}},
        unused=("fc.weight", "fc.bias"),
    ),
    "timm convnext": Source(
        timm_model("convnext_tiny", norm_eps=1e-3, **TIMM),
        by_timm,
        "timm ConvNeXt",
        {"name": "convnext_tiny", "widths": WIDTHS, "depths": DEPTHS, "norm_eps": 1e-3},
        {"architecture": "convnext_tiny", "model_args": TIMM | {"norm_eps": 1e-3}},
        unused=("head.fc.weight", "head.fc.bias"),
    ),
    "timm convnextv2": Source(
        timm_model("convnextv2_nano", **TIMM),
        by_timm,
        "timm ConvNeXt",
        {"name": "convnextv2_tiny", "widths": WIDTHS, "depths": DEPTHS},
        unused=("head.fc.weight", "head.fc.bias"),
    ),
    "timm convnext_atto_ols": Source(  # overlapping stem, linear layers as convolutions
        timm_model("convnext_atto_ols", **TIMM),
        by_timm,
        "timm ConvNeXt",
        {"name": "convnext_atto_ols", "widths": WIDTHS, "depths": DEPTHS},
        {"architecture": "convnext_atto_ols.a2_in1k", "num_classes": 3},
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
    elif source.config is None:
        torch.save({"model": model.state_dict(), "epoch": 3}, folder / "weights.pth")
        return folder / "weights.pth"
    else:
        save_file(model.state_dict(), folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(source.config))
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


# ------------------------------------------------------------------ shapes that two networks share

SMALL: dict[str, Any] = {"layers": [1] * 4, "channels": WIDTHS}


@pytest.mark.parametrize(
    ("name", "network"),
    [
        ("resnetblur18.pth", "resnetblur18"),
        ("resnetaa50d.untrained.bin", "resnetaa50d"),
        ("resnetblur50.best.pth.tar", "resnetblur50"),
        ("resnet18.pth", "resnet18"),
    ],
)
def test_the_name_of_a_file_tells_the_network(name: str, network: str, tmp_path: Path) -> None:
    """Where shapes do not: of a checkpoint, and of a start, which must be of that network."""
    model: Any = randomize(timm.create_model(network, num_classes=0, **SMALL))
    path = tmp_path / name
    torch.save(model.state_dict(), path)
    opened = open_weights(path)
    assert opened.fit is not None
    assert opened.backbone.spec["name"] == network
    assert "same shapes" not in opened.fit.why
    assert isinstance(opened.backbone, ConvNet)
    agree(opened.backbone, lambda images: by_timm(model, images))
    load_pretrained(ConvNet(**opened.backbone.spec), path)
    other = {"name": "resnetblur18" if network == "resnet18" else network.replace("aa", "blur")}
    if other["name"] == network:
        other = {"name": network.replace("blur", "")}
    with pytest.raises(UserError, match=f"weights of {network}, as the file's name says"):
        load_pretrained(ConvNet(**opened.backbone.spec | other), path)


def test_of_networks_with_the_same_shapes_the_doubt_is_said(tmp_path: Path) -> None:
    """With what to write; once it is written, the start is held to it."""
    torch.save(timm.create_model("resnetblur18", num_classes=0).state_dict(), tmp_path / "w.pth")
    for fit in (
        open_weights(tmp_path / "w.pth").fit,
        load_pretrained(ConvNet("resnet18"), tmp_path / "w.pth"),
    ):
        assert fit is not None
        assert "taken for timm's resnet18; resnetblur18 of the same shapes" in fit.why
        assert '{"architecture": NAME} into NAME.json' in fit.why
    (tmp_path / "w.json").write_text('{"architecture": "resnetblur18"}')
    assert open_weights(tmp_path / "w.pth").backbone.spec["name"] == "resnetblur18"
    with pytest.raises(UserError, match=r"weights of resnetblur18, as the JSON .* resnet18, which"):
        load_pretrained(ConvNet("resnet18"), tmp_path / "w.pth")


def test_a_file_of_another_network_than_its_name_says_is_read_by_its_shapes(tmp_path: Path) -> None:
    """A name is no promise."""
    torch.save(resnet(), tmp_path / "resnet50.pth")
    spec = open_weights(tmp_path / "resnet50.pth").backbone.spec
    assert (spec["name"], spec["widths"]) == ("resnet18", WIDTHS)


# --------------------------------------------------------------------------- prefixes, older files


@functools.cache
def resnet() -> Weights:
    """torchvision's, tiny."""
    return randomize(timm.create_model("resnet18", layers=DEPTHS, channels=WIDTHS)).state_dict()


def children(weights: Weights) -> Weights:
    """As in nn.Sequential(*list(resnet.children())[:-1])."""
    order = ("conv1", "bn1", "", "", "layer1", "layer2", "layer3", "layer4")
    first = {name: name.partition(".")[0] for name in weights}
    return {
        name.replace(first[name], f"backbone.{order.index(first[name])}", 1): value
        for name, value in weights.items()
        if first[name] != "fc"
    }


def dino_training(weights: Weights) -> dict[str, Any]:
    """DINO's checkpoint with a ResNet: the teacher is the backbone, its head is unused."""
    found = {
        f"module.backbone.{name}": value for name, value in weights.items() if "fc" not in name
    }
    student = {name: value + 1 for name, value in found.items()}
    teacher = {name.removeprefix("module."): value for name, value in found.items()}
    return {"student": student, "teacher": teacher | {"head.mlp.0.weight": torch.zeros(3, 3)}}


FORMS: dict[str, Callable[[Weights], Any]] = {
    "DINO's resnet50 file": lambda w: {n: v for n, v in w.items() if not n.startswith("fc.")},
    "DINO's training": dino_training,
    "solo-learn": lambda w: {
        "state_dict": {f"backbone.{n}": v for n, v in w.items()}
        | {"projector.0.weight": w["fc.weight"]}
    },
    "SwAV": lambda w: (
        {f"module.{n}": v for n, v in w.items()}
        | {
            "module.projection_head.0.weight": w["fc.weight"],
            "module.prototypes.weight": w["fc.bias"],
        }
    ),
    "lightly's children": children,
    "before num_batches_tracked": lambda w: {n: v for n, v in w.items() if "tracked" not in n},
}


@pytest.mark.parametrize("form", FORMS)
def test_a_resnet_is_found_below_prefixes_and_beside_heads(form: str, tmp_path: Path) -> None:
    """Every backbone weight is the file's, as start of a network of ours too."""
    weights = resnet()
    torch.save(FORMS[form](weights), tmp_path / "resnet.pth")
    backbone = open_weights(tmp_path / "resnet.pth").backbone
    state, own = backbone.state_dict(), {n: v for n, v in weights.items() if "fc." not in n}
    for ours, theirs in zip(state.values(), own.values(), strict=True):
        assert torch.equal(ours.double(), theirs.double())
    started = ConvNet(**{**backbone.spec, "in_chans": 1})
    fit = load_pretrained(started, tmp_path / "resnet.pth")
    assert fit.adapted == ["stem.0.weight"]
    gray = torch.randn(2, 1, 64, 64)
    cls = backbone.eval()(gray.expand(-1, 3, -1, -1)).cls
    torch.testing.assert_close(started.eval()(gray).cls, cls, rtol=1e-4, atol=1e-5)


def test_metas_files_are_read_as_timm_reads_them(tmp_path: Path) -> None:
    """ConvNeXt's own names, and DINOv3's hub, which has the last norm twice."""
    model: Any = randomize(timm.create_model("convnext_tiny", num_classes=0, **TIMM))
    backbone = ConvNet("convnext_tiny", norm="layer", widths=WIDTHS, depths=DEPTHS)
    save_file(model.state_dict(), tmp_path / "timm.safetensors")
    load_pretrained(backbone, tmp_path / "timm.safetensors")
    theirs = convnet_for_dinov3(backbone)
    back = checkpoint_filter_fn(dict(theirs), model)  # timm's reading of these names
    assert all(torch.equal(back[name], value.float()) for name, value in model.state_dict().items())
    for owner, lacks in (("ConvNeXt (Meta)", "norms.3."), ("DINOv3 ConvNeXt", "norm.")):
        found = {name: value for name, value in theirs.items() if not name.startswith(lacks)}
        torch.save(found, tmp_path / "hub.pth")
        opened = open_weights(tmp_path / "hub.pth")
        assert opened.fit is not None
        assert opened.fit.layout == owner
        same(opened.backbone, backbone)
    assert isinstance(opened.backbone, ConvNet)
    agree(opened.backbone, lambda images: by_timm(model, images))


def test_grn_of_convnext_v2s_own_files_is_read(tmp_path: Path) -> None:
    """There it has four dimensions, and its weights are called gamma and beta."""
    model: Any = randomize(timm.create_model("convnextv2_nano", num_classes=0, **TIMM))
    names = {".conv_dw.": ".dwconv.", ".mlp.fc": ".pwconv", "head.norm.": "norm."}
    names |= {".mlp.grn.weight": ".grn.gamma", ".mlp.grn.bias": ".grn.beta", ".blocks.": "."}
    found = {}
    for name, value in model.state_dict().items():
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        name = name.replace("stem.", "downsample_layers.0.")
        for i in range(1, 4):
            name = name.replace(f"stages.{i}.downsample.", f"downsample_layers.{i}.")
        found[name] = value.reshape(1, 1, 1, -1) if ".grn." in name else value.squeeze()
        if ".dwconv.weight" in name:
            found[name] = value
    torch.save({"model": found | {"head.weight": torch.zeros(3, 32)}}, tmp_path / "v2.pt")
    opened = open_weights(tmp_path / "v2.pt")
    assert opened.backbone.spec["name"] == "convnextv2_tiny"
    assert isinstance(opened.backbone, ConvNet)
    agree(opened.backbone, lambda images: by_timm(model, images))


# ---------------------------------------------------------------------------------- names, exports


def test_a_known_size_is_called_by_its_name(tmp_path: Path) -> None:
    """By number of layers, or by depths and width."""
    for name, norm in (("resnet34", "batch"), ("resnet26d", "batch"), ("convnextv2_nano", "layer")):
        with torch.device("meta"):
            shapes = ConvNet(name, norm=norm).state_dict()  # type: ignore[arg-type]
        spec = convnet_spec(Read("x", "", shapes, [], {"kind": "convnet"}), {}, "x")
        assert spec["name"] == name
        assert "widths" not in spec


@pytest.mark.parametrize("name", ["resnet10t", "test_convnext"])
def test_a_timm_convnet_is_opened_by_name(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With its preprocessing; the features are timm's."""
    made = pretend_download(monkeypatch)
    tag = timm.get_pretrained_cfg(name).tag
    opened = open_timm(f"{name}.{tag}")
    assert opened.backbone.spec["name"] == name
    size = timm.get_pretrained_cfg(name).input_size[-1]
    assert opened.image_size == size  # 176 of resnet10t, no multiple of 32
    assert opened.at(100).size == (100, 100)
    with pytest.raises(UserError, match="at least the backbone's patch size, 32"):
        opened.at(31)
    model: Any = made[0].double()
    assert isinstance(opened.backbone, ConvNet)
    agree(opened.backbone, lambda images: by_timm(model, images))


@pytest.mark.parametrize("whitened", [False, True])
def test_the_export_of_a_convnet_opens_by_its_file(whitened: bool, tmp_path: Path) -> None:
    """With the tokens of its folder."""
    own = ConvNet(widths=[16, 32], depths=[1, 1], patch_size=4, norm="group", fields=1).eval()
    out = exported(Compact(own, 4) if whitened else own, tmp_path / "out")
    file = open_backbone(find_checkpoint(str(out / "model.safetensors"), tmp_path))
    folder = open_backbone(find_checkpoint(str(out), tmp_path))
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(file.backbone(images).cls, folder.backbone(images).cls)
    assert (file.image_size, file.mean) == (folder.image_size, folder.mean)


@pytest.mark.parametrize("name", ["timm resnet26", "ConvNextModel"])
def test_a_file_alone_chooses_its_network(name: str, tmp_path: Path) -> None:
    """backbone.pretrained=FILE without another setting of the backbone."""
    source = SOURCES[name]
    path = saved(source, randomize(source.make()), tmp_path)
    words = ["data=shapes", f"backbone.pretrained={path}", "augment.global_size=32"]
    config = plan(begin_config(check_values(compose("pretrain", words))), facts()).config
    begun = build_method(config).export_backbone()
    opened = open_weights(path).backbone
    assert begun.spec == opened.spec
    wanted = opened.state_dict()
    assert all(torch.equal(wanted[name], value) for name, value in begun.state_dict().items())


# --------------------------------------------------------------------------------------- both ways


def ours(name: str, **settings: Any) -> ConvNet:
    """A backbone with generic weights in float64."""
    norm = "layer" if name.startswith("convnext") else "batch"
    backbone = randomize(ConvNet(name, norm=norm, **settings))  # type: ignore[arg-type]
    assert isinstance(backbone, ConvNet)
    return backbone


FOUR: dict[str, Any] = {"widths": WIDTHS, "depths": DEPTHS}
WIDE: dict[str, Any] = {"widths": RESNET["hidden_sizes"], "depths": DEPTHS}


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("resnet18", FOUR),
        ("resnet50", WIDE | {"in_chans": 1}),
        ("resnet10t", {"patch_size": 16}),
        ("convnext_tiny", FOUR | {"norm_eps": 1e-3}),
        ("convnextv2_atto", FOUR),
        ("convnext_large_mlp", FOUR),
    ],
)
def test_timm_gives_our_features_from_what_is_written(
    name: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    """Built by architecture and model_args, every weight in its place; read back, it is ours."""
    backbone = ours(name, **settings)
    weights, config = convnet_for_timm(backbone)
    about = json.loads(json.dumps(config))
    model: Any = timm.create_model(about["architecture"], num_classes=0, **about["model_args"])
    model.double().eval().load_state_dict(weights)
    if backbone.in_chans == 3:
        agree(backbone, lambda images: by_timm(model, images))
    save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    same(open_weights(tmp_path).backbone, backbone)


def same(read: Any, backbone: ConvNet) -> None:
    """The spec, and all weights to the last bit, in single precision."""
    assert read.spec == backbone.spec
    for name, value in backbone.state_dict().items():
        assert torch.equal(read.state_dict()[name].double(), value.double()), name


@pytest.mark.parametrize(
    ("name", "settings", "kind"),
    [
        ("resnet18", FOUR, "ResNetModel"),
        ("resnet50", WIDE, "ResNetModel"),
        ("convnext_tiny", FOUR | {"last_norm_eps": 1e-2}, "ConvNextModel"),
        ("convnextv2_tiny", FOUR | {"last_norm_eps": 1e-12}, "ConvNextV2Model"),
    ],
)
def test_transformers_gives_our_features_from_what_is_written(
    name: str, settings: dict[str, Any], kind: str, tmp_path: Path
) -> None:
    """AutoModel's class of the config, no key missing or left; read back, it is ours."""
    backbone = ours(name, **settings)
    weights, config = convnet_for_hugging_face(backbone)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(config))
    model, told = transformers.AutoModel.from_pretrained(
        tmp_path, output_loading_info=True, dtype=torch.float64
    )
    assert type(model).__name__ == kind
    assert not any(told.values())
    agree(backbone, lambda images: by_transformers(model.eval(), images))
    same(open_weights(tmp_path).backbone, backbone)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "convnext_tiny"])
def test_torchvision_gives_our_features_from_what_is_written(name: str, tmp_path: Path) -> None:
    """Only the classifier is missing; read back, it is ours."""
    with torch.device("meta"):  # drawing weights twice would take most of the time
        backbone = ConvNet(name, norm="layer" if name.startswith("convnext") else "batch")
    randomize(backbone.to_empty(device="cpu"))
    weights, config = convnet_for_torchvision(backbone)
    with torch.device("meta"):
        model = getattr(torchvision.models, config["model"])().eval()
    missing, unknown = model.load_state_dict(weights, strict=False, assign=True)
    assert {key.rpartition(".")[0] for key in missing} == {
        "fc" if "res" in name else "classifier.2"
    }
    assert unknown == []
    agree(backbone, lambda images: by_torchvision(model, images))
    save_file(weights, tmp_path / "tv.safetensors")
    same(open_weights(tmp_path / "tv.safetensors").backbone, backbone)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"widths": [8, 16], "depths": [1, 1], "patch_size": 4}, "small convnets given by widths"),
        ({"name": "resnet18", "norm": "group"}, "group normalization"),
        ({"name": "convnext_atto", "norm": "layer", "fields": 2}, "pyramids as class token"),
    ],
)
def test_what_a_program_lacks_is_not_written_for_it(settings: dict[str, Any], words: str) -> None:
    """In a sentence that names the formats which can hold it."""
    with torch.device("meta"):
        backbone = ConvNet(**settings)
    for write in (convnet_for_timm, convnet_for_hugging_face, convnet_for_torchvision):
        with pytest.raises(UserError, match="format=onnx or format=torch_export") as error:
            write(backbone)
        assert "\n" not in str(error.value)
        assert words in str(error.value) or write is not convnet_for_timm


# ---------------------------------------------------------------------------------------- refusals


def changed(**values: Tensor | None) -> Callable[[Weights], Weights]:
    """A ResNet's weights with some replaced or, if None, missing."""
    new = {name.replace("__", "."): value for name, value in values.items()}
    return lambda w: {n: v for n, v in (w | new).items() if v is not None}


@pytest.mark.parametrize(
    ("spoil", "about", "words"),
    [
        (
            changed(conv1__weight=torch.zeros(64, 3, 3, 3)),
            {},
            r"stem\.0\.weight is \(64, 3, 3, 3\)",
        ),
        (changed(bn1__running_mean=None), {}, "lacks stem.1.running_mean"),
        (changed(conv2__weight=torch.zeros(64, 3, 3, 3)), {}, "has conv2.weight"),
        (changed(layer1__0__se__fc__weight=torch.zeros(8)), {}, "has stages.0.0.se.fc.weight"),
        (
            lambda w: {n: v for n, v in w.items() if "layer4" not in n},
            {},
            "lacks a stem or one of four stages",
        ),
        (changed(), {"architecture": "resnet50"}, "for timm's resnet50 of that size"),
        (changed(), {"architecture": "local-dir:/tmp"}, "which timm does not have"),
        (changed(), {"architecture": "swin_tiny_patch4_window7_224"}, "cannot be built|is not a t"),
        (changed(), {"model_args": {"act_layer": "silu"}}, "act_layer=silu"),
        (changed(), {"model_args": {"global_pool": "max"}}, "another global_pool than avg"),
    ],
)
def test_a_network_that_is_none_of_ours_is_refused(
    spoil: Callable[[Weights], Weights], about: dict[str, Any], words: str, tmp_path: Path
) -> None:
    """In a sentence that names the file and what is odd."""
    torch.save(spoil(resnet()), tmp_path / "odd.pth")
    (tmp_path / "odd.json").write_text(json.dumps(about))
    with pytest.raises(UserError, match=words) as error:
        open_weights(tmp_path / "odd.pth")
    assert str(error.value).startswith(f"checkpoint={tmp_path / 'odd.pth'}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("key", ["downsample_in_bottleneck", "downsample_in_first_stage"])
def test_strides_at_other_places_are_refused(key: str, tmp_path: Path) -> None:
    """config.json says them, shapes do not: as a start, too."""
    hf("ResNet", **RESNET, **{key: True})().save_pretrained(tmp_path)  # type: ignore[operator]
    with pytest.raises(UserError, match=f"{key}=True"):
        open_weights(tmp_path)
    with pytest.raises(UserError, match=f"{key}=True"):
        load_pretrained(ConvNet("resnet50", **WIDE), tmp_path)
