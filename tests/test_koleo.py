"""KoLeo against plain loops: value, gradient, the edges, half precision, and two processes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import oracle
from dino_lite import distributed
from dino_lite.contracts import Match, Progress, Prototypes, Scores, Targets, Tokens
from dino_lite.losses.koleo import KoLeoLoss, koleo
from dino_lite.optim.schedules import Constant
from ranks import on_ranks


def mean(num: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """The weights of a mean."""
    return torch.full((num,), 1 / num, dtype=dtype)


def match(features: Tensor, weight: Tensor, num_crops: int) -> Match:
    """Class features of `num_crops` crops, crop-major, beside targets with these weights."""
    num_images = len(weight)
    tokens = Tokens(features, features[:, None], None, (1, 1))
    z, eye = torch.zeros(num_crops, num_images, 3).double(), Prototypes(torch.eye(3).double())
    row, col, pairs = z[..., 0], torch.zeros(3).double(), torch.ones(num_crops, 1).double()
    return Match(tokens, Targets(z, eye, row, col, 0.1, pairs, weight))


@settings(max_examples=40)
@given(seed=st.integers(0, 10_000), num=st.integers(1, 7), width=st.integers(2, 6))
def test_value_and_gradient_are_the_loops(seed: int, num: int, width: int) -> None:
    """Any rows and weights; the choice of a neighbor has no gradient, both of a pair have one."""
    torch.manual_seed(seed)
    x = torch.randn(num, width, dtype=torch.float64).requires_grad_()
    weight = torch.rand(num, dtype=torch.float64)
    found, wanted = koleo(x, weight), oracle.koleo(x, weight)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)
    slopes = [torch.autograd.grad(value, x)[0] for value in (found, wanted)]
    torch.testing.assert_close(slopes[0], slopes[1], rtol=1e-7, atol=1e-9)


def test_the_references_numbers_come_out() -> None:
    """What the official code makes of sin(0), sin(1.3), ... as four rows of five."""
    x = torch.sin(1.3 * torch.arange(20.0)).view(4, 5)
    assert float(koleo(x, mean(4, torch.float32))) == pytest.approx(1.495657, abs=1e-6)


@pytest.mark.parametrize("num", [1, 5])
def test_lone_rows_and_duplicates_have_the_references_value(num: int) -> None:
    """−ln(√1024·1e-8 + 1e-8) in float32, and a gradient that is finite; a lone row's is zero."""
    x = torch.randn(1, 1024).expand(num, -1).clone().requires_grad_()
    value = koleo(x, mean(num, torch.float32))
    value.backward()
    assert float(value.detach()) == pytest.approx(14.924173, abs=2e-3)
    assert torch.isfinite(x.grad).all()
    if num == 1:
        assert not x.grad.any()


def test_opposite_rows_are_each_others_neighbor() -> None:
    """Of two rows each has the other, however unlike: a row is never nearest to itself."""
    row = torch.tensor([[0.3, -0.9, 0.2]])
    value = koleo(torch.cat([row, -row]), mean(2, torch.float32))
    assert float(value) == pytest.approx(-math.log(2), abs=1e-6)


def test_half_precision_is_computed_in_float32() -> None:
    """The value of the rounded rows, with autocast or without: near rows stay apart."""
    x = (torch.randn(1, 16) + 0.02 * torch.randn(8, 16)).bfloat16().requires_grad_()
    wanted = koleo(x.detach().float(), mean(8, torch.float32))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = koleo(x, mean(8, torch.float32))
    found.backward()
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.detach(), wanted)
    assert torch.isfinite(x.grad).all()


def test_crops_are_searched_apart_and_add_up() -> None:
    """Two crops of an image are no neighbors; weights are the images', in every crop."""
    x, weight = torch.randn(6, 4, dtype=torch.float64), torch.rand(3, dtype=torch.float64)
    x[3:] = x[:3] + 1e-3
    loss = KoLeoLoss("tokens", Constant(0.1))
    wanted = oracle.koleo(x[:3], weight) + oracle.koleo(x[3:], weight)
    torch.testing.assert_close(loss(match(x, weight, 2)), wanted)
    assert loss.reads == "tokens"
    assert loss.weight(Progress(0, 1, 1)) == 0.1


def test_scores_are_no_tokens() -> None:
    """A match of the wrong kind is a programmer's mistake and says which loss met it."""
    target = match(torch.zeros(2, 3), mean(2), 1).target
    scores = Scores(torch.zeros(1, 2, 3), Prototypes(torch.eye(3)))
    with pytest.raises(TypeError, match="tokens"):
        KoLeoLoss("tokens", Constant(0.1))(Match(scores, target))


# ------------------------------------------------------------------------------------ two processes

SHARES = (slice(0, 3), slice(3, 8))  # rows of the two processes
CROPS = 2


def images() -> Tensor:
    """Eight images' numbers in two crops; each of the first process's is nearest to one of the
    second's.
    """
    torch.manual_seed(3)
    x = torch.randn(CROPS, 8, 5, dtype=torch.float64)
    x[:, 3:6] = x[:, :3] + 0.05 * torch.randn(CROPS, 3, 5, dtype=torch.float64)
    return x


def step(own: slice, weight: float, across_ranks: bool) -> tuple[Tensor, Tensor]:
    """Value of some images' loss and its gradient of the map that makes features of them."""
    torch.manual_seed(4)
    network = torch.nn.Linear(5, 4).double()
    features = network(images()[:, own].flatten(0, 1))
    num_images = len(range(*own.indices(8)))
    weights = torch.full((num_images,), weight, dtype=torch.float64)
    value = KoLeoLoss("tokens", Constant(0.1), across_ranks)(match(features, weights, CROPS))
    value.backward()
    return value.detach(), network.weight.grad


def two_ranks(rank: int) -> dict[str, Any]:
    """Value and gradient, averaged over ranks, with and without the others' rows; and the gather
    itself.
    """
    found: dict[str, Any] = {}
    for across in (True, False):
        terms = step(SHARES[rank], 2 / 8, across)
        found[str(across)] = [distributed.all_reduce_mean_(term) for term in terms]
    own = torch.arange(rank + 1.0).view(-1, 1).requires_grad_()
    everyone, first = distributed.all_gather_rows(own)
    (everyone * torch.tensor([[1.0], [10.0], [100.0]]) * (rank + 1)).sum().backward()
    return found | {"everyone": everyone.detach(), "first": first, "slope": own.grad}


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    """What two gloo processes found."""
    return on_ranks(2, two_ranks)


@pytest.mark.slow
def test_across_ranks_two_processes_are_one_with_the_joint_batch(
    ranks: list[dict[str, Any]],
) -> None:
    """The mean of the ranks' losses and of their gradients, with unequal numbers of rows."""
    wanted = list(step(slice(0, 8), 1 / 8, across_ranks=True))
    for found in ranks:
        torch.testing.assert_close(found["True"], wanted, rtol=1e-10, atol=1e-12)


def test_without_it_neighbors_are_the_ranks_own(ranks: list[dict[str, Any]]) -> None:
    """As if each process had its images for itself: another value, and another gradient."""
    halves = [step(own, 2 / 8, across_ranks=False) for own in SHARES]
    wanted = [(a + b) / 2 for a, b in zip(*halves, strict=True)]
    for found in ranks:
        torch.testing.assert_close(found["False"], wanted, rtol=1e-10, atol=1e-12)
        assert abs(float(found["False"][0] - found["True"][0])) > 0.1


def test_gathered_rows_send_their_gradients_home(ranks: list[dict[str, Any]]) -> None:
    """Each process learns where its rows begin; the gradients of all processes add up."""
    for rank, found in enumerate(ranks):
        assert found["everyone"].flatten().tolist() == [0.0, 0.0, 1.0]
        assert found["first"] == rank
        wanted = [[3.0], [30.0, 300.0]][rank]  # once from the first process, twice from the second
        assert found["slope"].flatten().tolist() == wanted
