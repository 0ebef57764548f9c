"""Which parameters decay, by name, and how gradients are bounded."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import oracle
from dino_lite.backbones.vit import ViT
from dino_lite.methods.dino import Student
from dino_lite.nn.heads import DINOHead
from dino_lite.optim.param_groups import clip_gradients_, param_groups


def student(learn_norm: bool = False, batch_norm: bool = False) -> Student:
    """A student of one block, named as a method names it."""
    backbone = ViT(image_size=16, patch_size=8, embed_dim=8, depth=1, num_heads=2)
    head = DINOHead(8, 12, 8, 4, 2, batch_norm=batch_norm, learn_norm=learn_norm)
    return Student(backbone, head)


MAPS = {
    "backbone.patch_embed.proj.weight",
    "backbone.blocks.0.attn.qkv.weight",
    "backbone.blocks.0.attn.proj.weight",
    "backbone.blocks.0.mlp.fc1.weight",
    "backbone.blocks.0.mlp.fc2.weight",
    "head.mlp.0.weight",
    "head.mlp.2.weight",
    "head.last_layer.weight_v",
}
LEARNED_INPUTS = {"backbone.cls_token", "backbone.pos_embed"}
BIASES_AND_NORMS = {
    "backbone.patch_embed.proj.bias",
    "backbone.blocks.0.norm1.weight",
    "backbone.blocks.0.norm1.bias",
    "backbone.blocks.0.attn.qkv.bias",
    "backbone.blocks.0.attn.proj.bias",
    "backbone.blocks.0.norm2.weight",
    "backbone.blocks.0.norm2.bias",
    "backbone.blocks.0.mlp.fc1.bias",
    "backbone.blocks.0.mlp.fc2.bias",
    "backbone.norm.weight",
    "backbone.norm.bias",
    "head.mlp.0.bias",
    "head.mlp.2.bias",
}
LENGTHS = {"head.last_layer.weight_g"}


def names(model: nn.Module, decay_tokens: bool) -> dict[bool, set[str]]:
    """Names by whether they decay; the parameters behind them are checked on the way."""
    named, found = dict(model.named_parameters()), {True: set[str](), False: set[str]()}
    for group in param_groups(model.named_parameters(), decay_tokens):
        assert group["weight_decay"] == 0.0
        assert [named[name] is p for name, p in zip(group["names"], group["params"], strict=True)]
        found[group["decay"]] = set(group["names"])
    return found


def test_ours_decays_maps_and_nothing_else() -> None:
    """Learned tokens and positions stand aside; frozen prototype lengths are in no group."""
    assert names(student(), decay_tokens=False) == {
        True: MAPS,
        False: BIASES_AND_NORMS | LEARNED_INPUTS,
    }


def test_the_reference_decays_tokens_and_positions_too() -> None:
    """decay_tokens=True is the official grouping."""
    assert names(student(), decay_tokens=True) == {
        True: MAPS | LEARNED_INPUTS,
        False: BIASES_AND_NORMS,
    }


def test_registers_and_mask_tokens_decay_only_as_in_the_reference() -> None:
    """Learned tokens all; LayerScale's factors never do."""
    sizes = {"image_size": 16, "patch_size": 8, "embed_dim": 8, "depth": 1, "num_heads": 2}
    backbone = ViT(**sizes, num_registers=2, mask_token=True, init_values=0.1)  # type: ignore[arg-type]
    tokens = {"cls_token", "pos_embed", "register_tokens", "mask_token"}
    scales = {"blocks.0.ls1.gamma", "blocks.0.ls2.gamma"}
    assert names(backbone, decay_tokens=False)[False] > tokens | scales
    assert names(backbone, decay_tokens=True)[True] > tokens
    assert names(backbone, decay_tokens=True)[False] > scales


def test_trained_prototype_lengths_decay_only_as_in_the_reference() -> None:
    """weight_g, two-dimensional as it is, is exempt with us and decayed there."""
    assert names(student(learn_norm=True), decay_tokens=False)[False] > LENGTHS
    assert names(student(learn_norm=True), decay_tokens=True)[True] > LENGTHS


def test_batch_norms_do_not_decay() -> None:
    """Scale and shift of the head's batch normalization are one-dimensional."""
    exempt = names(student(batch_norm=True), decay_tokens=True)[False]
    assert {"head.mlp.1.weight", "head.mlp.1.bias"} < exempt


def test_parameters_without_gradient_are_in_no_group() -> None:
    """A frozen backbone leaves the head's parameters, a frozen model no group at all."""
    model = student()
    model.backbone.requires_grad_(False)
    found = names(model, decay_tokens=False)
    assert all(name.startswith("head.") for name in found[True] | found[False])
    assert param_groups(model.requires_grad_(False).named_parameters()) == []


def test_every_trained_parameter_is_in_exactly_one_group() -> None:
    """Nothing is decayed twice or left behind."""
    model = student(learn_norm=True, batch_norm=True)
    groups = param_groups(model.named_parameters())
    together = [id(p) for group in groups for p in group["params"]]
    assert sorted(together) == sorted(id(p) for p in model.parameters() if p.requires_grad)


def test_groups_are_taken_by_an_optimizer() -> None:
    """AdamW keeps the marks, by which the step writes the decay."""
    optimizer = torch.optim.AdamW(param_groups(student().named_parameters()))
    assert [group["decay"] for group in optimizer.param_groups] == [True, False]


# ------------------------------------------------------------------------------------ clipping


def random_gradients(scale: float, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Three tensors of unlike size and unlike norm."""
    shapes = [(3, 4), (7,), (1, 2, 2)]
    return [scale * 10**i * torch.randn(*s, dtype=dtype) for i, s in enumerate(shapes)]


@settings(max_examples=40)
@given(
    seed=st.integers(0, 1000),
    scale=st.sampled_from([1e-6, 0.01, 1.0, 1e3]),
    limit=st.sampled_from([0.05, 1.0, 3.0, 1e4]),
)
def test_clipping_is_the_oracles(seed: int, scale: float, limit: float) -> None:
    """Both ways bound as the loops do, and both return the joint norm before that."""
    torch.manual_seed(seed)
    gradients = random_gradients(scale)
    norm = math.sqrt(sum(float((g * g).sum()) for g in gradients))
    for by, clip in (("global", oracle.clip_global), ("parameter", oracle.clip_each)):
        wanted = clip(gradients, limit)
        found = [g.clone() for g in gradients]
        assert float(clip_gradients_(found, limit, by)) == pytest.approx(norm, rel=1e-12)  # type: ignore[arg-type]
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=0.0)


@pytest.mark.parametrize("by", ["global", "parameter"])
def test_a_limit_of_zero_bounds_nothing(by: str) -> None:
    """Gradients stay bit for bit; the norm is still told."""
    gradients = random_gradients(100.0)
    before = [g.clone() for g in gradients]
    norm = clip_gradients_(gradients, 0.0, by)  # type: ignore[arg-type]
    assert all(torch.equal(a, b) for a, b in zip(gradients, before, strict=True))
    assert float(norm) == pytest.approx(math.sqrt(sum(float((g * g).sum()) for g in before)))


@pytest.mark.parametrize("by", ["global", "parameter"])
def test_gradients_of_zero_stay_zero(by: str) -> None:
    """No division by a norm of zero."""
    gradients = [torch.zeros(3), torch.zeros(2, 2)]
    assert float(clip_gradients_(gradients, 1.0, by)) == 0.0  # type: ignore[arg-type]
    assert all(torch.equal(g, torch.zeros_like(g)) for g in gradients)


@pytest.mark.parametrize("by", ["global", "parameter"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("limit", [0.0, 1.0])
def test_one_bad_number_makes_the_norm_not_finite(by: str, bad: float, limit: float) -> None:
    """That norm is what decides whether a step is skipped."""
    gradients = random_gradients(1.0, torch.float32)
    gradients[1][3] = bad
    assert not torch.isfinite(clip_gradients_(gradients, limit, by))  # type: ignore[arg-type]


def test_clipping_by_parameter_turns_the_step_and_global_does_not() -> None:
    """Only the global factor keeps the direction of the joint gradient."""
    together, apart = (torch.tensor([3.0, 4.0]), torch.tensor([0.3])), torch.tensor([3.0, 4.0])
    clip_gradients_(together, 1.0, "global")
    assert float(together[0][0] / together[1][0]) == pytest.approx(10.0)
    small = torch.tensor([0.3])
    clip_gradients_([apart, small], 1.0, "parameter")
    assert float(small) == pytest.approx(0.3)
    assert float(apart.norm()) == pytest.approx(1.0)
