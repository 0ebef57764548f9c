"""Which parameters decay and how fast each learns, by name, and how gradients are bounded."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import oracle
from dino_lite.backbones.vit import ViT
from dino_lite.methods.dino import Student
from dino_lite.nn.heads import DINOHead
from dino_lite.optim.param_groups import ClipBy, clip_gradients_, clip_groups, param_groups


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
    for group in param_groups(model, decay_tokens=decay_tokens):
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
    assert param_groups(model.requires_grad_(False)) == []


@pytest.mark.parametrize("settings", [{}, {"layer_decay": 0.9, "freeze_by": "rate"}])
def test_every_trained_parameter_is_in_exactly_one_group(settings: dict[str, Any]) -> None:
    """Nothing is decayed twice or left behind."""
    model = student(learn_norm=True, batch_norm=True)
    groups = param_groups(model, **settings)
    together = [id(p) for group in groups for p in group["params"]]
    assert sorted(together) == sorted(id(p) for p in model.parameters() if p.requires_grad)


def test_groups_are_taken_by_an_optimizer() -> None:
    """AdamW keeps the marks, by which the step writes the decay."""
    optimizer = torch.optim.AdamW(param_groups(student()))
    assert [group["decay"] for group in optimizer.param_groups] == [True, False]


# ------------------------------------------------------------------------------------ rates


def scales(model: Student, **settings: Any) -> dict[str, float]:
    """What each parameter's rate is multiplied by."""
    groups = param_groups(model, **settings)
    return {name: group["rate_scale"] for group in groups for name in group["names"]}


def test_rates_fall_from_layer_to_layer() -> None:
    """1 for head and last norm, the decay to the power of the layers above for what is below."""
    backbone = ViT(image_size=16, patch_size=8, embed_dim=8, depth=2, num_heads=2)
    found = scales(Student(backbone, DINOHead(8, 12, 8, 4, 2)), layer_decay=0.5)
    inside = {
        "backbone.cls_token": 0.125,
        "backbone.pos_embed": 0.125,
        "backbone.patch_embed.proj.weight": 0.125,
        "backbone.blocks.0.attn.qkv.weight": 0.25,
        "backbone.blocks.1.mlp.fc1.bias": 0.5,
        "backbone.norm.weight": 1.0,
    }
    assert {name: found[name] for name in inside} == inside
    assert {value for name, value in found.items() if name.startswith("head.")} == {1.0}


def test_the_patch_embedding_has_a_factor_of_its_own() -> None:
    """It multiplies that of its layer, and nobody else's."""
    plain = scales(student(), layer_decay=0.5)
    found = scales(student(), layer_decay=0.5, patch_embed_scale=0.2)
    for name, scale in plain.items():
        patches = name.startswith("backbone.patch_embed.")
        assert found[name] == pytest.approx(0.2 * scale if patches else scale), name


def test_without_factors_there_are_two_groups_decayed_first() -> None:
    """What checkpoints of earlier versions hold, in their order."""
    groups = param_groups(student(learn_norm=True))
    assert [group["decay"] for group in groups] == [True, False]
    assert [group["rate_scale"] for group in groups] == [1.0, 1.0]
    assert not any(group["last_layer"] for group in groups)


def test_equal_parameters_share_a_group() -> None:
    """One group for each pair of factor and decay that occurs: for layer decay, two a layer and the
    tokens' one.
    """
    groups = param_groups(student(), layer_decay=0.9, patch_embed_scale=0.2)
    kinds = [(group["rate_scale"], group["decay"]) for group in groups]
    assert len(kinds) == len(set(kinds)) == 7
    assert [decay for _, decay in kinds] == sorted((decay for _, decay in kinds), reverse=True)


def test_freezing_by_rate_sets_the_last_layers_of_all_heads_apart() -> None:
    """In groups of their own, marked; by gradient they stay where they were."""
    model = student(learn_norm=True)
    model.patch_head = DINOHead(8, 12, 8, 4, 2)
    groups = param_groups(model, freeze_by="rate")
    apart = {
        name: group["decay"] for group in groups if group["last_layer"] for name in group["names"]
    }
    assert apart == {
        "head.last_layer.weight_v": True,
        "head.last_layer.weight_g": False,
        "patch_head.last_layer.weight_v": True,
    }
    others = [name for group in groups if not group["last_layer"] for name in group["names"]]
    assert not [name for name in others if "last_layer" in name]


# ------------------------------------------------------------------------------------ clipping


def random_gradients(scale: float, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Three tensors of unlike size and unlike norm."""
    shapes = [(3, 4), (7,), (1, 2, 2)]
    return [scale * 10**i * torch.randn(*s, dtype=dtype) for i, s in enumerate(shapes)]


def apart(gradients: list[Tensor]) -> list[list[Tensor]]:
    """Each gradient for itself."""
    return [[gradient] for gradient in gradients]


WAYS: dict[str, Callable[[list[Tensor]], list[list[Tensor]]]] = {
    "together": lambda gradients: [gradients],
    "in two groups": lambda gradients: [gradients[:2], [], gradients[2:]],
    "apart": apart,
}


@settings(max_examples=40)
@given(
    seed=st.integers(0, 1000),
    scale=st.sampled_from([1e-6, 0.01, 1.0, 1e3]),
    limit=st.sampled_from([0.05, 1.0, 3.0, 1e4]),
)
def test_clipping_is_the_oracles(seed: int, scale: float, limit: float) -> None:
    """Every group is bounded as the loop does it, and what is returned is the joint norm before."""
    torch.manual_seed(seed)
    gradients = random_gradients(scale)
    norm = math.sqrt(sum(float((g * g).sum()) for g in gradients))
    for divide in WAYS.values():
        wanted = [g for group in divide(gradients) for g in oracle.clip_global(group, limit)]
        found = [g.clone() for g in gradients]
        assert float(clip_gradients_(divide(found), limit)) == pytest.approx(norm, rel=1e-12)
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=0.0)


@pytest.mark.parametrize("way", WAYS)
def test_a_limit_of_zero_bounds_nothing(way: str) -> None:
    """Gradients stay bit for bit; the norm is still told."""
    gradients = random_gradients(100.0)
    before = [g.clone() for g in gradients]
    norm = clip_gradients_(WAYS[way](gradients), 0.0)
    assert all(torch.equal(a, b) for a, b in zip(gradients, before, strict=True))
    assert float(norm) == pytest.approx(math.sqrt(sum(float((g * g).sum()) for g in before)))


@pytest.mark.parametrize("way", WAYS)
def test_gradients_of_zero_stay_zero(way: str) -> None:
    """No division by a norm of zero."""
    gradients = [torch.zeros(3), torch.zeros(2, 2), torch.zeros(1)]
    assert float(clip_gradients_(WAYS[way](gradients), 1.0)) == 0.0
    assert all(torch.equal(g, torch.zeros_like(g)) for g in gradients)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("limit", [0.0, 1.0])
def test_one_bad_number_makes_the_norm_not_finite(way: str, bad: float, limit: float) -> None:
    """That norm is what decides whether a step is skipped."""
    gradients = random_gradients(1.0, torch.float32)
    gradients[1][3] = bad
    assert not torch.isfinite(clip_gradients_(WAYS[way](gradients), limit))


def test_clipping_apart_turns_the_step_and_together_does_not() -> None:
    """Only one factor for all keeps the direction of the joint gradient."""
    together = [torch.tensor([3.0, 4.0]), torch.tensor([0.3])]
    single = [gradient.clone() for gradient in together]
    clip_gradients_([together], 1.0)
    assert float(together[0][0] / together[1][0]) == pytest.approx(10.0)
    clip_gradients_(apart(single), 1.0)
    assert float(single[1]) == pytest.approx(0.3)
    assert float(single[0].norm()) == pytest.approx(1.0)


def test_what_is_bounded_together() -> None:
    """All, the parameters of each child of the student, or each alone; what is not trained is in no
    group.
    """
    model = student()
    backbone = [id(p) for p in model.backbone.parameters()]
    head = [id(p) for p in model.head.parameters() if p.requires_grad]
    assert len(head) < len(list(model.head.parameters()))
    wanted: dict[ClipBy, list[list[int]]] = {
        "global": [backbone + head],
        "module": [backbone, head],
        "parameter": [[one] for one in backbone + head],
    }
    for by, groups in wanted.items():
        assert [[id(p) for p in group] for group in clip_groups(model, by)] == groups
