"""Graphs of torch's operators: what ONNX and torch.export write answers as the backbone does."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dino_lite.backbones.compact import Compact
from dino_lite.backbones.convnet import ConvNet
from dino_lite.backbones.rope import RoPEViT
from dino_lite.backbones.vit import ViT
from dino_lite.contracts import Backbone, Tokens, UserError
from dino_lite.data.preprocessing import Preprocessing
from dino_lite.formats import verify
from dino_lite.formats.format import Claim
from dino_lite.formats.graph import Graph
from dino_lite.formats.onnx import OPSET, Onnx
from dino_lite.formats.opened import Opened
from dino_lite.formats.torch_export import TorchExport

SIZES: dict[str, Any] = {"patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2}
STAGES: dict[str, Any] = {"patch_size": 8, "widths": [8, 16], "depths": [1, 1]}


def vit() -> Backbone:
    """A Compact of a ViT with everything that a ViT may have, in bfloat16."""
    parts: dict[str, Any] = {"num_registers": 2, "init_values": 0.5, "mlp": "swiglu"}
    whole = ViT(**SIZES, image_size=24, qk_norm=True, mask_token=True, drop_path=0.5, **parts)
    return Compact(whole, 4).bfloat16()


NETWORKS = {  # with the size of training
    "vit": (vit, (16, 40)),
    "rope": (lambda: RoPEViT(**SIZES, qkv_bias=True).double(), (16, 32)),
    "fields": (lambda: ConvNet(**STAGES, fields=2, norm="group"), (24, 24)),
    "pooled": (lambda: ConvNet(**STAGES), (24, 24)),
}
CASES = [
    ("vit", Onnx(half=True), ["model.onnx", "model_fp16.onnx"]),
    ("vit", TorchExport(sizes=[[24, 16]]), ["model.pt2", "model_24x16.pt2"]),
    ("rope", Onnx(), ["model.onnx"]),
    ("rope", TorchExport(sizes=[24, [16, 32]]), ["model.pt2", "model_24.pt2"]),
    ("fields", Onnx(), ["model.onnx"]),
    ("fields", TorchExport(), ["model.pt2"]),
    ("pooled", Onnx(sizes=[32]), ["model.onnx"]),
    ("pooled", TorchExport(sizes=[32]), ["model.pt2"]),
]


def opened(name: str) -> Opened:
    """A backbone of generic weights, in training mode."""
    torch.manual_seed(0)
    make, size = NETWORKS[name]
    backbone = make()
    with torch.no_grad():
        for weight in [*backbone.parameters(), *backbone.buffers()]:
            if weight.is_floating_point():
                weight.add_(0.1 * torch.rand_like(weight))
    return Opened(backbone, Preprocessing(size), {})


Reader = Callable[[Tensor], tuple[Tensor, Tensor]]


def reader(claim: Claim, folder: Path) -> Reader:
    """`cls` and `patches` of pixels by the lines of a claim; the file is loaded once."""
    names: dict[str, Any] = {"folder": str(folder)}
    exec(claim.load, names)

    def read(pixels: Tensor) -> tuple[Tensor, Tensor]:
        exec(claim.run, names | (found := {"pixels": pixels}), found)
        return torch.as_tensor(found["cls"]), torch.as_tensor(found["patches"])

    return read


def hold(claim: Claim, read: Reader, backbone: Backbone) -> None:
    """One image and three have the tokens of `backbone`, which is in float32, at every size."""
    for size in verify.sizes_of(claim, backbone.patch_size):
        for num in (1, 3):
            pixels = torch.randn(num, backbone.in_chans, *size)
            with torch.no_grad():
                wanted = backbone(pixels)
            for found, ours in zip(read(pixels), wanted, strict=False):
                assert (found.shape, found.dtype) == (ours.shape, torch.float32)
                off = (found - ours).abs().max() / ours.square().mean().sqrt()
                assert off <= claim.tolerance


@pytest.mark.slow
@pytest.mark.parametrize(("name", "format_", "files"), CASES)
def test_files_answer_as_the_backbone_at_every_claimed_size(
    name: str, format_: Any, files: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Other sizes are refused, not answered wrongly. Nothing is printed, no file names a path of
    this machine or a module of ours, and the backbone is left as it was.
    """
    source = opened(name)
    dtype = next(source.backbone.parameters()).dtype
    claims = format_.write(source, tmp_path)
    assert capfd.readouterr() == ("", "")
    assert source.backbone.training
    assert next(source.backbone.parameters()).dtype == dtype
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(files)
    assert len(claims) == len(files)
    backbone, unclaimed = source.backbone.float().eval(), (48, 32)
    for claim, file in zip(claims, files, strict=True):
        assert file in claim.load
        read = reader(claim, tmp_path)
        hold(claim, read, backbone)
        if not claim.any_size:
            assert len(claim.sizes) == 1
            with pytest.raises(Exception, match=r"(?i)expected"):
                read(torch.randn(1, 3, *unclaimed))
        content = (tmp_path / file).read_bytes()
        for word in (b"dino_lite", b"site-packages", b".py", str(tmp_path).encode()):
            assert word not in content, word
        if file.endswith("onnx"):
            look_at(tmp_path / file, claim)
    assert claims[0].sizes[0] == source.preprocessing.size
    assert claims[0].any_size == (name == "pooled")


def look_at(path: Path, claim: Claim) -> None:
    """The graph is of the stated opset and resamples nothing, its dynamic axes have names, and
    only half precision has float16 weights.
    """
    import onnx

    model = onnx.load(path)
    assert [(each.domain, each.version) for each in model.opset_import] == [("", OPSET)]
    assert "Resize" not in {node.op_type for node in model.graph.node}
    half = onnx.TensorProto.FLOAT16 in {each.data_type for each in model.graph.initializer}
    assert claim.tolerance == (2e-2 if half else 1e-4)
    assert half == ("fp16" in path.name)
    axes = [
        axis.dim_param or axis.dim_value for axis in model.graph.input[0].type.tensor_type.shape.dim
    ]
    sides = ["height", "width"] if claim.any_size else list(claim.sizes[0])
    assert axes == ["batch", 3, *sides]


def test_whitening_stays_finite_in_half_precision() -> None:
    """Its weights may exceed the range of float16, so the map is applied in float32."""
    compact = Compact(ViT(**SIZES, image_size=16), 4)
    with torch.no_grad():
        compact.reduce.weight.mul_(1e6)
        images = torch.randn(2, 3, 16, 16)
        found = Graph(compact, (16, 16), half=True).eval()(images)["cls"]
        wanted = compact.eval()(images).cls
    assert float((found - wanted).norm()) < 2e-2 * float(wanted.norm())


@pytest.mark.parametrize(
    ("sizes", "words"),
    [([20], "20x20 pixels do not divide into patches of 8"), ([[16, 0]], "list of image sizes")],
)
def test_an_impossible_size_is_a_sentence(sizes: Any, words: str, tmp_path: Path) -> None:
    """Before the first file is written."""
    source = opened("rope")
    with pytest.raises(UserError, match=words):
        TorchExport(sizes=sizes).write(source, tmp_path)
    assert not list(tmp_path.iterdir())


class Choosy(ConvNet):
    """Looks at pixels to decide what to do."""

    def forward(self, images: Tensor, *_: Any) -> Tokens:
        return super().forward(images if images.sum() > 0 else -images)


def test_a_backbone_that_cannot_be_traced_is_a_sentence(tmp_path: Path) -> None:
    """Its code is another package's; logging works again afterwards."""
    source = Opened(Choosy(**STAGES), Preprocessing((24, 24)), {})
    with pytest.raises(UserError, match=r"cannot trace the backbone .*Choosy .*safetensors"):
        TorchExport().write(source, tmp_path)
    assert logging.root.manager.disable == logging.NOTSET
