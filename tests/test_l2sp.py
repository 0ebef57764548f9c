"""L2-SP: value, gradient and share of a step against plain loops; what it anchors."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from dino_lite.contracts import Progress, UserError
from dino_lite.distributed import all_reduce_mean_
from dino_lite.losses.l2sp import L2SP
from dino_lite.losses.prototype import PrototypeLoss
from dino_lite.methods.step import Step
from dino_lite.methods.stillness import train_last_blocks
from dino_lite.optim.param_groups import param_groups
from dino_lite.optim.schedules import Constant
from ranks import on_ranks
from test_dino import random_crops
from test_retention import dino, loud_network, vit

AT = Progress(0, 10, 5)


def step_of(method: Any, start: Any, **settings: Any) -> Step:
    """DINO with the penalty, by plain gradient descent."""
    loss: dict[str, Any] = {
        "dino": PrototypeLoss("cls", Constant(1.0)),
        "l2sp": L2SP(Constant(0.3)),
    }
    optimizer = torch.optim.SGD(param_groups(method.student), lr=1.0)
    rates = {"learning_rate": Constant(0.1), "weight_decay": Constant(0.0), "clip": 0.0}
    return Step(method, loss, optimizer, start=start, **rates | settings)


def test_value_and_gradient_are_the_loops() -> None:
    """½·Σ(w − w⁰)², whose gradient is w − w⁰; frozen weights have no part in it."""
    backbone, start = (loud_network(vit()).double() for _ in range(2))
    train_last_blocks(backbone, 1)
    value = L2SP(Constant(1.0))(backbone, start)
    value.backward()
    wanted, first = 0.0, dict(start.named_parameters())
    for name, parameter in backbone.named_parameters():
        if not parameter.requires_grad:
            assert not name.startswith(("blocks.1", "norm."))
            assert parameter.grad is None
            continue
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, (parameter - first[name]).detach())
        for w, w0 in zip(parameter.flatten().tolist(), first[name].flatten().tolist(), strict=True):
            wanted += (w - w0) ** 2 / 2
    assert value.item() == pytest.approx(wanted, rel=1e-10)
    assert all(p.grad is None for p in start.parameters())
    assert L2SP(Constant(1.0))(backbone.requires_grad_(False), start).item() == 0


def trained(size: int, first: int, last: int, exchange: bool) -> dict[str, Tensor]:
    """Two steps on a part of the batch, in micro-batches."""
    torch.manual_seed(5)
    method: Any = dino(loud_network(vit())).double()
    start = loud_network(copy.deepcopy(method.student.backbone))
    passes = -(-(last - first) // size) if size else 1
    count = [0]

    def backward(total: Tensor) -> None:
        total.backward()
        count[0] += 1
        if exchange and count[0] % passes == 0:
            for parameter in method.student.parameters():
                if parameter.grad is not None:
                    all_reduce_mean_(parameter.grad)

    step = step_of(method, start, micro_batch_size=size, backward=backward)
    crops = random_crops(4, 2, dtype=torch.float64).part(first, last)
    for i in range(2):
        step(crops, Progress(i, 10, 5))
    found: dict[str, Tensor] = method.student.state_dict()
    return found


def half(rank: int) -> dict[str, Tensor]:
    """Two images of four, one a micro-batch."""
    return trained(1, 2 * rank, 2 * rank + 2, exchange=True)


def test_it_counts_once_a_step_whatever_the_parts() -> None:
    """Micro-batches and processes change nothing."""
    whole = trained(0, 0, 4, exchange=False)
    for other in (trained(1, 0, 4, exchange=False), *on_ranks(2, half)):
        for name, value in whole.items():
            torch.testing.assert_close(other[name], value, rtol=1e-9, atol=1e-11)


def test_a_step_adds_the_weighted_penalty() -> None:
    """To the loss and to the backbone's gradient, and not to the heads'."""
    method: Any = dino(loud_network(vit())).double()
    start, crops = loud_network(vit()).double(), random_crops(2, 0, dtype=torch.float64)
    without: Any = copy.deepcopy(method)
    before = copy.deepcopy(method.student.backbone)
    scalars = step_of(method, start)(crops, AT)
    plain = step_of(without, start)
    del plain.losses["l2sp"]
    alone = plain(crops, AT)
    penalty = L2SP(Constant(1.0))(before, start).detach()
    torch.testing.assert_close(scalars["l2sp"], penalty)
    torch.testing.assert_close(scalars["loss"], alone["loss"] + 0.3 * penalty)
    own = dict(method.student.named_parameters())
    for name, value in without.student.named_parameters():
        inner = name.removeprefix("backbone.")
        pull = 0.0
        if inner != name:
            pull = before.get_parameter(inner) - start.get_parameter(inner)
        torch.testing.assert_close(own[name], value - 0.1 * 0.3 * pull)


def test_without_a_start_it_is_refused() -> None:
    """As with several students."""
    step = step_of(dino(vit()), None)
    with pytest.raises(UserError, match=r"loss\.l2sp holds the weights of one student"):
        step(random_crops(2, 0), AT)
