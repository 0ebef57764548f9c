"""A backbone is an ordinary module: hooks, adapters, tracing and quantization work on it."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from dino_lite.backbones.blocks import run_blocks
from dino_lite.backbones.layers import UnbiasedKeys, is_bare
from dino_lite.backbones.rope import RoPEViT
from dino_lite.backbones.transformer import Transformer
from dino_lite.backbones.vit import ViT
from ranks import apart

SIZES: dict[str, Any] = {"patch_size": 8, "embed_dim": 16, "depth": 3, "num_heads": 2}
FAMILIES = {
    "vit": lambda: ViT(**SIZES, image_size=16, init_values=0.5),
    "swiglu": lambda: ViT(**SIZES, image_size=16, mlp="swiglu", num_registers=2, qk_norm=True),
    "rope": lambda: RoPEViT(**SIZES, qkv_bias=True, init_values=1.0),
}


def make(family: str) -> Transformer:
    """A small backbone of generic weights, in training mode."""
    torch.manual_seed(0)
    backbone: Transformer = FAMILIES[family]()
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return backbone.train()


def answer(backbone: nn.Module, cls_only: bool = False) -> Tensor:
    """Tokens of two images, side by side."""
    torch.manual_seed(1)
    tokens = backbone(torch.randn(2, 3, 16, 24), cls_only=cls_only)
    return torch.cat([tokens.cls[:, None], tokens.patches], dim=1)


def slopes(backbone: nn.Module, cls_only: bool) -> dict[str, Tensor | None]:
    """Gradients of a fixed mixture of the answer."""
    out = answer(backbone, cls_only)
    backbone.zero_grad()
    (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
    return {name: parameter.grad for name, parameter in backbone.named_parameters()}


def linears(backbone: Transformer) -> list[tuple[nn.Module, str]]:
    """Every nn.Linear of the blocks, as its parent and name."""
    return [
        (parent, name)
        for parent in backbone.blocks.modules()
        for name, child in parent.named_children()
        if type(child) is nn.Linear
    ]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("cls_only", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_forward_hooks_of_every_module_fire_and_change_nothing(
    family: str, cls_only: bool, training: bool
) -> None:
    """Of blocks, attention, MLP, layers, stem and last norm; values and gradients stay."""
    backbone = make(family).train(training)
    plain, plain_slopes = answer(backbone, cls_only), slopes(backbone, cls_only)
    seen: list[str] = []
    skipped = ("", "blocks", "patch_embed.proj", "patch_embed.norm")
    named = {name: part for name, part in backbone.named_modules() if name not in skipped}
    for name, part in named.items():
        part.register_forward_hook(lambda module, inputs, out, name=name: seen.append(name))
    torch.testing.assert_close(answer(backbone, cls_only), plain)
    assert set(seen) == named.keys()
    assert seen.count("blocks.2.attn.qkv") == 1
    for name, slope in slopes(backbone, cls_only).items():
        torch.testing.assert_close(slope, plain_slopes[name], msg=name)


def test_a_hook_changes_what_the_next_layer_gets() -> None:
    """In training too, where a bare layer's weight may be read instead of calling it."""
    for name in ("blocks.1.mlp.fc2", "blocks.2.attn.qkv", "blocks.1.mlp.act"):
        backbone = make("vit")
        before = answer(backbone, cls_only=True)
        layer = backbone.get_submodule(name)
        hook = layer.register_forward_hook(lambda module, inputs, out: out * 2)
        assert (answer(backbone, cls_only=True) - before).abs().max() > 1e-3, name
        hook.remove()
        assert torch.equal(answer(backbone, cls_only=True), before), name


def test_a_backward_hook_sees_the_gradient() -> None:
    """Of the layers whose weight may be read instead of calling them."""
    backbone, seen = make("vit"), []
    for name in ("blocks.0.mlp.fc2", "blocks.2.attn.qkv"):
        layer = backbone.get_submodule(name)
        layer.register_full_backward_hook(lambda module, given, out, name=name: seen.append(name))
    slopes(backbone, cls_only=True)
    assert sorted(seen) == ["blocks.0.mlp.fc2", "blocks.2.attn.qkv"]


class Adapted(nn.Linear):
    """A linear layer with low-rank weights added (LoRA, Hu et al. 2021)."""

    def __init__(self, layer: nn.Linear, rank: int = 2) -> None:
        super().__init__(layer.in_features, layer.out_features, layer.bias is not None)
        self.load_state_dict(layer.state_dict())
        self.down = nn.Parameter(torch.randn(rank, layer.in_features))
        self.up = nn.Parameter(torch.randn(layer.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + F.linear(F.linear(x, self.down), self.up)


@pytest.mark.parametrize("memory", ["high", "normal", "low"])
@pytest.mark.parametrize("cls_only", [False, True])
def test_adapters_change_the_answer_and_are_trained(memory: Any, cls_only: bool) -> None:
    """Every one of them, in whatever way a training step goes through the blocks."""
    backbone = make("vit")
    backbone.set_memory(memory, compiled=False)
    before = answer(backbone, cls_only)
    for parent, name in linears(backbone):
        setattr(parent, name, Adapted(getattr(parent, name)))
    added = answer(backbone, cls_only)
    assert (added - before).abs().max() > 1e-2
    found = slopes(backbone, cls_only)
    low_rank = {name: slope for name, slope in found.items() if name.endswith((".up", ".down"))}
    assert len(low_rank) == 2 * 4 * 3
    assert all(slope is not None and slope.abs().max() > 1e-6 for slope in low_rank.values())
    merged = make("vit")  # the same, with low-rank weights added to the weights
    for (parent, name), (other, _) in zip(linears(merged), adapted(backbone), strict=True):
        layer = getattr(other, name)
        with torch.no_grad():
            getattr(parent, name).weight += layer.up @ layer.down
    torch.testing.assert_close(added, answer(merged, cls_only), rtol=1e-3, atol=1e-4)


def adapted(backbone: Transformer) -> list[tuple[nn.Module, str]]:
    """As `linears`, of adapted layers."""
    return [
        (parent, name)
        for parent in backbone.blocks.modules()
        for name, child in parent.named_children()
        if isinstance(child, Adapted)
    ]


def test_a_layer_is_bare_only_where_nobody_can_tell() -> None:
    """Subclasses, hooks of any kind, parametrizations, replaced forwards and tensor subclasses."""

    class Weights(nn.Parameter):
        pass

    def parametrized(layer: nn.Linear) -> None:
        parametrize.register_parametrization(layer, "weight", nn.Identity())

    def replaced(layer: nn.Linear) -> None:
        layer.forward = lambda x: x  # type: ignore[method-assign]

    def subclass(layer: nn.Linear) -> None:
        layer.weight = Weights(layer.weight.detach())

    assert is_bare(nn.Linear(2, 2))
    assert not is_bare(Adapted(nn.Linear(2, 2)))
    for change in (
        lambda layer: layer.register_forward_hook(lambda *given: None),
        lambda layer: layer.register_forward_pre_hook(lambda *given: None),
        lambda layer: layer.register_full_backward_hook(lambda *given: None),
        lambda layer: layer.register_full_backward_pre_hook(lambda *given: None),
        *(parametrized, replaced, subclass),
    ):
        layer = nn.Linear(2, 2)
        change(layer)
        assert not is_bare(layer)
    keys = UnbiasedKeys(nn.Linear(2, 6, bias=False))
    assert is_bare(keys)
    parametrize.register_parametrization(keys, "q_bias", nn.Identity())
    assert not is_bare(keys)
    everywhere = nn.modules.module.register_module_forward_hook(lambda *given: None)
    assert not is_bare(nn.Linear(2, 2))
    everywhere.remove()
    assert is_bare(nn.Linear(2, 2))


_TRACED = """
import warnings
import torch
from torch import nn
from dino_lite.backbones.compact import Compact
from test_modules import FAMILIES, make
warnings.simplefilter("ignore")  # of sizes that become constants, and of torch.jit's deprecation
class Plain(nn.Module):
    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone
    def forward(self, images):
        return self.backbone(images)[:2]  # tensors alone: traces know neither None nor numbers
def slopes(backbone, images):
    loss = sum(part.square().sum() for part in backbone(images))
    return torch.autograd.grad(loss, list(backbone.parameters()))
for network in [*map(make, FAMILIES), Compact(make("vit"), 4)]:
    for training in (False, True):
        backbone = Plain(network).train(training)
        traced = torch.jit.trace(backbone, torch.zeros(2, 3, 16, 24))
        images = torch.randn(3, 3, 16, 24)
        for found, wanted in zip(traced(images), backbone(images), strict=True):
            torch.testing.assert_close(found, wanted)
        for found, wanted in zip(*(slopes(each, images) for each in (traced, backbone))):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
print("equal")
"""


@pytest.mark.slow
def test_a_traced_backbone_answers_alike(root: Path) -> None:
    """torch.jit.trace, on more images than it was traced with, and with gradients in training; in a
    process of its own, since checked shapes take sizes, which are tensors in a trace, for errors.
    """
    paths = os.pathsep.join([str(root), str(root / "tests")])
    done = subprocess.run(
        [sys.executable, "-c", _TRACED],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": paths},
    )
    assert done.stdout.strip() == "equal", done.stderr[-2000:]


@pytest.mark.parametrize("family", FAMILIES)
def test_an_exported_program_answers_alike(family: str) -> None:
    """torch.export, with gradients enabled or not, on more images than it was traced with."""
    backbone = make(family).eval()
    images, free = torch.randn(3, 3, 16, 24), {0: torch.export.Dim("batch", min=1)}
    shapes = {"images": free, "mask": None, "cls_only": None}
    for enabled in (True, False):
        with torch.set_grad_enabled(enabled), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            given = (torch.zeros_like(images[:2]), None, False)
            program = torch.export.export(backbone, given, dynamic_shapes=shapes)
        found, wanted = program.module()(images, None, False), backbone(images)
        torch.testing.assert_close(found.cls, wanted.cls)
        torch.testing.assert_close(found.patches, wanted.patches)


def compiled_whole() -> None:
    """Gradients of a backbone compiled as one graph are its own."""
    backbone = make("swiglu")
    whole = torch.compile(backbone, fullgraph=True, backend="eager")
    slopes(whole, cls_only=True)
    found = {name: part.grad for name, part in backbone.named_parameters()}
    for name, slope in slopes(backbone, cls_only=True).items():
        torch.testing.assert_close(found[name], slope, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.slow
def test_a_backbone_in_training_compiles_as_one_graph() -> None:
    """No graph break where layers are otherwise recomputed."""
    apart(compiled_whole)


@pytest.mark.skipif(
    not {"x86", "fbgemm", "qnnpack", "onednn"} & set(torch.backends.quantized.supported_engines),
    reason="this build of torch has no engine of quantized layers",
)
@pytest.mark.parametrize("cls_only", [False, True])
def test_dynamic_quantization_runs_and_answers_nearly_alike(cls_only: bool) -> None:
    """Of every linear layer, to 8 bits."""
    backbone = make("vit").eval()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # torch.ao is deprecated
        quantize = torch.ao.quantization.quantize_dynamic
        small = quantize(copy.deepcopy(backbone), {nn.Linear}, dtype=torch.qint8)
        assert not linears(small)
        found, wanted = answer(small, cls_only), answer(backbone, cls_only)
    assert 0 < float((found - wanted).norm()) < 0.1 * float(wanted.norm())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # gradients go past the quantized layers
        answer(small.train(), cls_only).sum().backward()
    assert small.cls_token.grad is not None


def test_short_cuts_answer_as_the_modules_do() -> None:
    """Values and gradients of a training step with and without them."""
    backbone = make("vit")
    backbone.set_memory("normal", compiled=False)
    quick = slopes(backbone, cls_only=True)
    for part in backbone.blocks.modules():
        part.register_forward_hook(lambda *given: None)
    for name, slope in slopes(backbone, cls_only=True).items():
        torch.testing.assert_close(slope, quick[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("enabled", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_class_token_alone_takes_no_queries_of_other_tokens(
    family: str, enabled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In evaluation and the teacher's forward pass too; a hook gets the whole projection."""
    backbone, rows = make(family).eval(), []
    linear = F.linear

    def seen(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        rows.append((x.shape[1], len(weight)))
        return linear(x, weight, bias)

    monkeypatch.setattr(F, "linear", seen)
    with torch.set_grad_enabled(enabled):
        quick = answer(backbone, cls_only=True)
        few, width = (1, 16), backbone.embed_dim
        assert rows.count(few) >= 1
        assert sum(size == 3 * width for _, size in rows) == 2
        backbone.blocks[-1].attn.qkv.register_forward_hook(lambda *given: None)
        rows.clear()
        torch.testing.assert_close(answer(backbone, cls_only=True), quick)
        assert sum(size == 3 * width for _, size in rows) == 3


def test_a_block_called_alone_is_a_step_of_the_pass() -> None:
    """block(tokens), as feature extractors and FSDP call it."""
    backbone = make("vit").eval()
    tokens, _ = backbone.embed(torch.randn(2, 3, 16, 16))
    wanted = run_blocks(list(backbone.blocks), tokens)
    for block in backbone.blocks:
        tokens = block(tokens)
    torch.testing.assert_close(tokens, wanted)
