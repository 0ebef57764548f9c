"""The backbone held still for a while, then ramped up; the last blocks alone; no trace of either
where they are off.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from dino_lite.contracts import Progress, UserError
from dino_lite.losses.koleo import KoLeoLoss
from dino_lite.losses.prototype import PrototypeLoss
from dino_lite.methods.step import Step
from dino_lite.methods.stillness import train_last_blocks
from dino_lite.optim.param_groups import param_groups
from dino_lite.optim.schedules import Constant
from ranks import on_ranks
from test_dino import random_crops
from test_retention import METHODS, convnet, dino, loud, loud_network, vit


def step_of(method: Any, apart: bool = False, **settings: Any) -> Step:
    """DINO by AdamW at a constant rate."""
    loss: dict[str, Any] = {"dino": PrototypeLoss("cls", Constant(1.0))}
    if method.masks_crops:
        loss["ibot"] = PrototypeLoss("patch", Constant(1.0))
    groups = param_groups(method.student, backbone_apart=apart)
    optimizer = torch.optim.AdamW(groups, fused=True)
    rates = {"learning_rate": Constant(0.01), "weight_decay": Constant(0.1)}
    return Step(method, loss, optimizer, **rates | settings)


def state(method: Any) -> dict[str, Tensor]:
    """Weights and buffers, copied."""
    return {name: value.clone() for name, value in method.state_dict().items()}


def moved(method: Any, before: dict[str, Tensor]) -> set[str]:
    """Names of what has changed."""
    return {n for n, v in method.state_dict().items() if not torch.equal(v, before[n])}


def of_backbone(names: set[str]) -> set[str]:
    return {name for name in names if "backbone." in name}


@pytest.mark.parametrize("name", ["dino", "dinov2", "convnet"])
def test_heads_alone_are_trained_while_the_backbone_is_frozen(name: str) -> None:
    """No weight, no running statistic of student or teacher, no moment; modes come back."""
    method: Any = loud(METHODS[name]()).train()
    with torch.no_grad():  # student and teacher begin alike
        method.ema.module.load_state_dict(method.student.state_dict())
    before = state(method)
    step = step_of(method, freeze_backbone="2 steps")
    for i in range(2):
        step(random_crops(4, 2), Progress(i, 10, 5))
    changed = moved(method, before)
    assert not of_backbone(changed)
    assert any(each.startswith("student.head.") for each in changed)
    backbone = set(method.student.backbone.parameters())
    assert not backbone & step.optimizer.state.keys()
    assert all(p.requires_grad for p in backbone)
    assert all(part.training for part in method.modules())
    step(random_crops(4, 2), Progress(2, 10, 5))
    assert of_backbone(moved(method, before))
    if name == "convnet":
        assert any("running_mean" in n and "teachers" in n for n in moved(method, before))


def test_a_frozen_backbone_needs_no_backward_pass() -> None:
    """In one process nothing is recorded for it."""
    method: Any = loud(dino(vit()))
    seen: list[bool] = []
    method.student.backbone.norm.register_forward_hook(
        lambda norm, given, out: seen.append(out.requires_grad)
    )
    step = step_of(method, freeze_backbone="1 steps")
    for i in range(2):
        step(random_crops(2, 0), Progress(i, 10, 5))
    assert seen == [False, True]


def frozen_on_ranks(rank: int) -> dict[str, Tensor]:
    """Two steps; with several processes, DDP waits for every gradient."""
    torch.manual_seed(0)
    method: Any = loud(dino(vit())).double()
    waited: list[bool] = []

    def backward(total: Tensor) -> None:
        total.backward()
        waited.append(all(p.grad is not None for p in method.student.backbone.parameters()))

    step = step_of(method, freeze_backbone="1 steps", backward=backward, clip=0.01)
    # Drawn before a step seeds the generator with its rank.
    for i, crops in enumerate([random_crops(4, 2, dtype=torch.float64) for _ in range(2)]):
        step(crops, Progress(i, 10, 5))
    assert waited[0] is (torch.distributed.is_initialized())
    return state(method)


def test_processes_and_one_alone_make_the_same_step() -> None:
    """The norm that clips does not count the backbone's gradients either."""
    alone, (other, _) = frozen_on_ranks(0), on_ranks(2, frozen_on_ranks)
    for name, value in alone.items():
        torch.testing.assert_close(other[name], value, rtol=1e-10, atol=1e-12)


def test_the_backbones_rate_rises_from_zero() -> None:
    """Linearly after the freeze; the heads' stays."""
    method: Any = dino(vit())
    step = step_of(method, apart=True, freeze_backbone="1 steps", backbone_ramp="4 steps")
    rates = []
    for i in range(7):
        step(random_crops(2, 0), Progress(i, 10, 5))
        rates.append({g.get("backbone", False): g["lr"] for g in step.optimizer.param_groups})
    assert [rate[False] for rate in rates] == [0.01] * 7
    wanted = [0.0, 0.0, 0.0025, 0.005, 0.0075, 0.01, 0.01]
    assert [rate[True] for rate in rates] == pytest.approx(wanted)


def test_groups_of_a_run_without_a_ramp_are_as_before() -> None:
    """Old checkpoints of optimizers fit."""
    groups = param_groups(dino(vit()).student)
    assert len(groups) == 2
    assert not any("backbone" in group for group in groups)
    apart = param_groups(dino(vit()).student, backbone_apart=True)
    assert sorted(n for g in groups for n in g["names"]) == sorted(
        n for g in apart for n in g["names"]
    )
    for group in apart:
        named = {name.startswith("backbone.") for name in group["names"]}
        assert named == {group.get("backbone", False)}


def test_where_nothing_else_is_trained_a_freeze_is_refused() -> None:
    """A loss of the backbone's tokens alone."""
    method = dino(vit())
    loss = {"koleo": KoLeoLoss("tokens", Constant(1.0))}
    optimizer = torch.optim.SGD(param_groups(method.student))
    rates: dict[str, Any] = {"learning_rate": Constant(0.1), "weight_decay": Constant(0.0)}
    step = Step(method, loss, optimizer, freeze_backbone=0.5, **rates)
    with pytest.raises(UserError, match=r"optim\.freeze_backbone: no loss trains anything but"):
        step(random_crops(2, 0), Progress(0, 10, 5))


@pytest.mark.parametrize("network", [vit, convnet])
def test_the_last_blocks_alone_are_trained(network: Any) -> None:
    """With the last norm and the heads; what lies below has no gradient, moments or statistics."""
    method: Any = dino(loud_network(network())).train()
    train_last_blocks(method.student, 1)
    before, step = state(method), step_of(method)
    backbone = method.student.backbone
    for i in range(2):
        step(random_crops(4, 2), Progress(i, 10, 5))
    for name in of_backbone(moved(method, before)):
        inner = name.rpartition("backbone.")[2]
        assert backbone.depth_of(inner) >= backbone.num_blocks
    still = [
        n for n, _ in backbone.named_parameters() if backbone.depth_of(n) < backbone.num_blocks
    ]
    assert still
    assert all(backbone.get_parameter(n).grad is None for n in still)
    assert any("running_mean" in n for n in before) is any(
        "running_mean" in n and "stages.1" in n for n in moved(method, before)
    )


def test_the_last_blocks_are_exactly_those_of_a_whole_backward_pass() -> None:
    """Their gradients are those of training all."""
    whole: Any = loud(dino(vit())).double()
    part, crops = copy.deepcopy(whole), random_crops(2, 0, dtype=torch.float64)
    train_last_blocks(part.student, 1)
    for method in (whole, part):
        step_of(method, learning_rate=Constant(0.0), clip=0.0)(crops, Progress(0, 10, 5))
    for name, parameter in part.student.named_parameters():
        if parameter.requires_grad:
            grad = whole.student.get_parameter(name).grad
            torch.testing.assert_close(parameter.grad, grad, rtol=1e-9, atol=1e-12)


def test_more_blocks_than_there_are_is_a_sentence() -> None:
    """With the number there is."""
    with pytest.raises(UserError, match=r"optim\.last_blocks=3: the backbone has 2 blocks"):
        train_last_blocks(dino(vit()).student, 3)
