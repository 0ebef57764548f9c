"""Convolutional networks: timm's numbers, pooled and by cells, norms, stages, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models.convnext import ConvNeXt
from timm.models.resnet import ResNet
from torch import Tensor, nn

from dino_lite.backbones.convnet import ConvNet
from dino_lite.backbones.spec import build_backbone
from dino_lite.commands.evaluate import run_evaluate
from dino_lite.commands.export import run_export
from dino_lite.config import compose
from dino_lite.contracts import UserError
from dino_lite.nn.teachers import frozen_copy
from dino_lite.runs.identity import requested
from dino_lite.runs.pretraining import run_pretrain
from test_vit import randomize
from tiny import photos, tiny, train

SMALL = {"widths": [16, 32, 48], "depths": [1, 2, 1], "patch_size": 8, "norm": "group"}


def small(**settings: Any) -> ConvNet:
    """Three stages in float64, generic weights, eval mode."""
    backbone = ConvNet(**SMALL | settings).double().eval()  # type: ignore[arg-type]
    randomize(backbone)
    return backbone


def images(*size: int, num: int = 2, channels: int = 3) -> Tensor:
    """Noise."""
    return torch.randn(num, channels, *size, dtype=torch.float64)


def norm_of(name: str) -> str:
    """What the named model is published with."""
    return "layer" if name.startswith("convnext") else "batch"


def fill(backbone: ConvNet, model: nn.Module) -> None:
    """The weights of a timm model, which come in the same order."""
    weights = zip(backbone.state_dict(), model.state_dict().values(), strict=True)
    backbone.load_state_dict(dict(weights))


# ------------------------------------------------------------------------------------ forward


@pytest.mark.slow
@pytest.mark.parametrize("size", [(64, 64), (32, 96)])
@pytest.mark.parametrize("name", ["resnet18", "resnet50", "convnext_atto"])
def test_named_models_give_timms_features(name: str, size: tuple[int, int]) -> None:
    """The class token is what timm's classifier would get; cells are timm's map, through its last
    norm.
    """
    model: Any = timm.create_model(name, num_classes=0).double().eval()
    randomize(model)
    backbone = ConvNet(name, norm=norm_of(name)).double().eval()
    fill(backbone, model)
    tokens = backbone(images_ := images(*size))
    cells = model.forward_features(images_)
    torch.testing.assert_close(tokens.cls, model(images_))
    if isinstance(model, ConvNeXt):
        cells = model.head.norm(cells)
    torch.testing.assert_close(tokens.patches, cells.flatten(2).transpose(1, 2))
    assert tokens.grid == (size[0] // 32, size[1] // 32)
    assert tokens.registers is None
    assert tokens.cls.shape == (2, backbone.embed_dim)


@pytest.mark.parametrize("patch_size", [4, 8, 16])
def test_the_small_network_has_a_stride_of_patch_size(patch_size: int) -> None:
    """Stages halve the map, the stem does the rest."""
    tokens = small(patch_size=patch_size)(images(32, 64))
    assert tokens.grid == (32 // patch_size, 64 // patch_size)
    assert tokens.patches.shape == (2, tokens.grid[0] * tokens.grid[1], 48)
    torch.testing.assert_close(tokens.cls, tokens.patches.mean(1))


def test_the_small_network_is_timms_resnet_without_its_stem() -> None:
    """With a timm ResNet's widths and depths, stages are its layers."""
    settings = {"widths": [64, 128, 256, 512], "depths": [2, 2, 2, 2], "patch_size": 8}
    backbone = ConvNet(norm="batch", **settings).double().eval()  # type: ignore[arg-type]
    randomize(backbone)
    model = timm.create_model("resnet18", num_classes=0).double().eval()
    assert isinstance(model, ResNet)
    layers = nn.ModuleList([model.layer1, model.layer2, model.layer3, model.layer4])
    layers.load_state_dict(backbone.stages.state_dict())
    x = backbone.stem(images_ := images(16, 16))
    for layer in layers:
        x = layer(x)
    torch.testing.assert_close(backbone(images_).cls, x.mean((2, 3)))


def test_fields_are_means_of_cells_of_all_stages_side_by_side() -> None:
    """fields=2: of the last map its quarters, of the one before 4x4, of the first 8x8."""
    backbone = small(fields=2)
    maps = [backbone.stem(images_ := images(64, 128))]
    for stage in backbone.stages:
        maps.append(stage(maps[-1]))
    expected = []
    for cells, side in zip(maps[1:], (8, 4, 2), strict=True):
        height, width = cells.shape[2] // side, cells.shape[3] // side
        fields = cells.unflatten(3, (side, width)).unflatten(2, (side, height))
        expected.append(fields.mean((3, 5)).flatten(1))
    tokens = backbone(images_)
    torch.testing.assert_close(tokens.cls, torch.cat(expected, 1))
    assert backbone.embed_dim == tokens.cls.shape[1] == 16 * 64 + 32 * 16 + 48 * 4
    assert tokens.patches.shape == (2, 8 * 16, 48)


def test_a_named_network_may_have_fields() -> None:
    """One field a side of the last map is the usual class token, at the end of the others."""
    plain, fields = (ConvNet("convnext_atto", norm="layer", fields=num) for num in (0, 1))
    fields.load_state_dict(plain.state_dict())
    x = images(64, 64).float()
    cls = fields.eval()(x).cls
    assert cls.shape == (2, fields.embed_dim)
    torch.testing.assert_close(cls[:, -plain.embed_dim :], plain.eval()(x).cls)


def test_cells_can_be_left_out() -> None:
    """cls_only gives the same class token and no patches."""
    for backbone in (small(), small(fields=2), ConvNet("resnet18").double().eval()):
        tokens, all_ = backbone(x := images(32, 32), cls_only=True), backbone(x)
        assert tokens.patches.shape == (2, 0, all_.patches.shape[2])
        torch.testing.assert_close(tokens.cls, all_.cls)


@pytest.mark.parametrize("fields", [0, 2])
def test_stages_are_blocks(fields: int) -> None:
    """Each as if the network ended there; narrower ones are filled up with zeros."""
    backbone = small(fields=fields)
    assert backbone.num_blocks == 3
    x = images(32, 32)
    first, last = backbone.intermediate(x, [0, -1])
    torch.testing.assert_close(last.cls, backbone(x).cls)
    torch.testing.assert_close(last.patches, backbone(x).patches)
    cells = backbone.stages[0](backbone.stem(x))
    alone = F.adaptive_avg_pool2d(cells, max(1, fields)).flatten(1)
    torch.testing.assert_close(first.cls, F.pad(alone, (0, backbone.embed_dim - alone.shape[1])))
    assert first.patches.shape == (2, 16 * 16, 48)
    assert first.grid == (16, 16)


def test_every_parameter_has_its_depth() -> None:
    """Stem 0, stage i i+1, the last norm behind the last stage."""
    backbone = ConvNet("convnext_atto", norm="layer")
    depths = {name: backbone.depth_of(name) for name, _ in backbone.named_parameters()}
    assert depths["stem.0.weight"] == 0
    assert depths["norm.weight"] == 5
    assert {depth for name, depth in depths.items() if name.startswith("stages.3")} == {4}
    assert set(depths.values()) == {0, 1, 2, 3, 4, 5}


def test_groups_of_channels_are_normalized_image_by_image() -> None:
    """With norm=group an image's features do not depend on the others, in train mode either."""
    x = images(32, 32, num=4)
    alone, batch = small(norm="group").train(), small(norm="batch").train()
    torch.testing.assert_close(alone(x).cls[:2], alone(x[:2]).cls)
    assert (batch(x).cls[:2] - batch(x[:2]).cls).abs().max() > 1e-3


def test_a_teacher_drops_no_paths() -> None:
    """The copy goes through every block, in train mode too."""
    student = small(drop_path=0.9).train()
    teacher, x = frozen_copy(student), images(32, 32)
    torch.testing.assert_close(teacher(x).cls, student.eval()(x).cls)
    assert (student.train()(x).cls - student(x).cls).abs().max() > 1e-3


def test_the_spec_rebuilds_it() -> None:
    """Plain JSON; weights of the one fit the other."""
    for backbone in (small(in_chans=1), ConvNet("resnet18", norm="group", patch_size=16).double()):
        spec = json.loads(json.dumps(backbone.stored_spec()))
        again: Any = build_backbone(spec).double()
        assert isinstance(again, ConvNet)
        again.load_state_dict(backbone.state_dict())
        x = images(32, 32, channels=backbone.in_chans)
        torch.testing.assert_close(again.eval()(x).cls, backbone.eval()(x).cls)


# ------------------------------------------------------------------------------------ refusals


def test_what_a_convnet_has_not_is_said() -> None:
    """No attention, which costs a picture; no mask, which a method would need."""
    with pytest.raises(UserError, match="no attention"):
        small().attention(images(32, 32))
    with pytest.raises(NotImplementedError, match="mask"):
        small()(images(32, 32), mask=torch.zeros(2, 16, dtype=torch.bool))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"name": "vit_tiny_patch16_224"}, "cannot be built"),
        ({"name": "regnetx_002", "norm": "batch"}, "is not a timm ResNet or ConvNeXt"),
        ({"name": "convnext_atto", "norm": "batch"}, "choose layer for a ConvNeXt"),
        ({"name": "resnet18", "norm": "layer"}, "choose layer for a ConvNeXt"),
        ({"name": "no_such_net"}, "backbone.name=no_such_net"),
        ({"name": "resnet18", "patch_size": 5}, "8, 16 or 32"),
        ({"norm": "layer"}, "backbone.norm=layer"),
        ({"widths": [16]}, "one number per stage"),
        ({"patch_size": 6}, "a multiple of 4"),
        ({"widths": None, "depths": None}, "one number per stage"),
    ],
)
def test_what_cannot_be_built_is_refused(settings: dict[str, Any], words: str) -> None:
    """In a sentence."""
    with pytest.raises(UserError, match=words) as caught:
        ConvNet(**SMALL | settings)
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------ in a run

CONVNET = {
    "_target_": "dino_lite.backbones.convnet.ConvNet",
    "name": "resnet",
    "widths": [8, 16],
    "depths": [1, 1],
    "norm": "group",
    "fields": 2,
    "patch_size": 4,
    "in_chans": 3,
    "drop_path": 0.1,
}


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["group", "batch"])
def test_a_run_trains_measures_and_draws(
    norm: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """End to end; only the picture of attention is missing, and that is told."""
    run = train(tmp_path, "baselines=true", f"backbone={json.dumps(CONVNET | {'norm': norm})}")
    assert (run / "pca.png").is_file()
    assert (run / "neighbors.png").is_file()
    assert not (run / "attention.png").exists()
    assert "attention.png was not drawn" in capsys.readouterr().out
    assert "knn_trained" in json.loads((run / "results.json").read_text())
    asked = [f"checkpoint={run}", f"runs_dir={tmp_path}"]
    measured = run_evaluate(compose("evaluate", [*asked, "eval=[knn,linear]"]))
    assert {"knn", "linear"} <= measured.keys()  # the linear one reads both stages
    written = run_export(compose("export", asked))
    assert written["safetensors"]["largest_difference"] < 1e-5


def test_batch_norm_makes_micro_batches_part_of_a_runs_identity(tmp_path: Path) -> None:
    """Statistics are those of a micro-batch: other ones are another run."""
    key = "trainer.micro_batch_size"
    for norm, counts in (("batch", True), ("group", False)):
        asked = tiny(tmp_path, f"backbone={json.dumps(CONVNET | {'norm': norm})}", f"{key}=4")
        assert (key in requested(asked)) is counts


def test_a_plain_run_on_a_cpu_is_a_convnets_and_keeps_its_micro_batches(tmp_path: Path) -> None:
    """Nobody asked for batch normalization: going on with parts of a batch is refused all the
    same.
    """
    photos(tmp_path / "photos", [f"{i}.png" for i in range(6)])
    request = [
        *(f"data.root={tmp_path / 'photos'}", f"runs_dir={tmp_path / 'runs'}"),
        *("trainer.accelerator=cpu", "trainer.max_steps=2", "loader.batch_size=4"),
        "loader.num_workers=0",
    ]
    run = Path(run_pretrain(compose("pretrain", request))["run"])
    assert run.name.startswith("dino_photos_resnet_")
    with pytest.raises(UserError, match=r"trainer.micro_batch_size=0, not 2") as caught:
        run_pretrain(compose("pretrain", [*request, "trainer.micro_batch_size=2"]))
    assert "\n" not in str(caught.value)
