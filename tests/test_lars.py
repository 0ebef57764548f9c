"""LARS against a plain loop, its published step, and what a bad gradient leaves alone."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from dino_lite.optim.lars import LARS


def test_one_step_is_the_references() -> None:
    """Numbers of DINO's code: a matrix moves by a share of its length, a bias by its gradient."""
    weight = nn.Parameter(torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64))
    bias = nn.Parameter(torch.ones(2, dtype=torch.float64))
    for parameter in (weight, bias):
        parameter.grad = torch.ones_like(parameter)
    LARS([weight, bias], lr=0.1, weight_decay=1e-4).step()
    wanted = [[0.99972618, 1.99972618], [2.99972606, 3.99972606]]
    torch.testing.assert_close(weight.data, torch.tensor(wanted).double(), rtol=0.0, atol=2e-7)
    torch.testing.assert_close(bias.data, torch.full((2,), 0.9, dtype=torch.float64))


def plain_step(
    parameter: Tensor, gradient: Tensor, average: Tensor, rate: float, decay: float
) -> tuple[Tensor, Tensor]:
    """One tensor's step, momentum .9 and eta .001; gives its new value and average."""
    if parameter.ndim != 1:
        gradient = gradient + decay * parameter
        length, slope = float(parameter.norm()), float(gradient.norm())
        if length > 0 and slope > 0:
            gradient = gradient * (0.001 * length / slope)
    average = 0.9 * average + gradient
    return parameter - rate * average, average


def network() -> list[nn.Parameter]:
    """A matrix, a bias, a convolution, a matrix of zeros, and one that never has a gradient."""
    shapes = [(3, 4), (5,), (2, 3, 2, 2), (2, 2), (6, 2)]
    made = [nn.Parameter(torch.randn(shape, dtype=torch.float64)) for shape in shapes]
    made[3].data.zero_()
    return made


def test_steps_are_the_plain_loops() -> None:
    """Two groups with decays and rates that move; a parameter of length 0, a gradient of 0."""
    parameters = network()
    wanted = [p.detach().clone() for p in parameters]
    averages = [torch.zeros_like(p) for p in wanted]
    optimizer = LARS([{"params": parameters[:2]}, {"params": parameters[2:], "weight_decay": 0.0}])
    for i in range(4):
        rate, decay = 0.5 / (i + 1), 0.01 * i
        optimizer.param_groups[0] |= {"lr": rate, "weight_decay": decay}
        optimizer.param_groups[1]["lr"] = 2 * rate
        for j, parameter in enumerate(parameters[:4]):
            gradient = torch.randn_like(parameter) * (0.0 if (i, j) == (1, 2) else 1.0)
            parameter.grad = gradient
            own = (rate, decay) if j < 2 else (2 * rate, 0.0)
            wanted[j], averages[j] = plain_step(wanted[j], gradient, averages[j], *own)
        optimizer.step()
        for parameter, value in zip(parameters, wanted, strict=True):
            torch.testing.assert_close(parameter.data, value, rtol=1e-12, atol=1e-14)
    assert parameters[4] not in optimizer.state


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_where_found_inf_is_set_nothing_moves(first: bool, bad: float) -> None:
    """Weights and averages stay bit for bit, also when there were none; the next step is as if it
    had not been.
    """
    parameters = network()[:3]
    optimizer = LARS(parameters, lr=0.1, weight_decay=0.1)

    def step(found: float, gradient: float) -> None:
        for parameter in parameters:
            parameter.grad = torch.full_like(parameter, gradient)
        optimizer.found_inf = torch.tensor(found)
        optimizer.step()

    if not first:
        step(0.0, 1.0)
    before = [p.detach().clone() for p in parameters]
    averages = copy.deepcopy([optimizer.state[p].get("mu", torch.zeros(())) for p in parameters])
    step(1.0, bad)
    for parameter, value, average in zip(parameters, before, averages, strict=True):
        assert torch.equal(parameter, value)
        assert torch.equal(optimizer.state[parameter]["mu"], average.expand_as(value))
    step(0.0, 1.0)
    assert all(torch.isfinite(p).all() for p in parameters)
    assert not any(torch.equal(p, value) for p, value in zip(parameters, before, strict=True))


def test_its_memory_survives_a_checkpoint() -> None:
    """A state that was saved goes on to the same weights, bit for bit."""
    parameters = network()[:3]
    twins = copy.deepcopy(parameters)
    first, second = LARS(parameters, lr=0.1), LARS(twins, lr=0.1)
    for i in range(3):
        gradients = [torch.randn_like(p) for p in parameters]
        for optimizer, own in ((first, parameters), (second, twins)):
            if i == 2 and optimizer is second:
                optimizer = LARS(twins, lr=0.5)
                optimizer.load_state_dict(second.state_dict())
            for parameter, gradient in zip(own, gradients, strict=True):
                parameter.grad = gradient
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(parameters, twins, strict=True))
