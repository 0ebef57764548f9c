"""The EMA center and Sinkhorn-Knopp by formula, skipped steps, half precision, bounded memory; and
two processes against one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import oracle
from dino_lite import distributed
from dino_lite.contracts import (
    LOGITS_BYTES,
    Backbone,
    Crops,
    Progress,
    Prototypes,
    Targets,
    Tokens,
    UserError,
)
from dino_lite.losses.prototype import PrototypeLoss, cross_view_pairs
from dino_lite.methods.dino import DINO
from dino_lite.methods.step import Step
from dino_lite.nn.centering import EMACentering, SinkhornKnopp
from dino_lite.nn.heads import DINOHead
from dino_lite.optim.param_groups import param_groups
from dino_lite.optim.schedules import Constant, Cosine
from ranks import on_ranks

YES, NO = torch.tensor(True), torch.tensor(False)


def unit(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Rows of unit norm."""
    return F.normalize(torch.randn(*shape, dtype=dtype), dim=-1)


def probs(centering: EMACentering | SinkhornKnopp, z: Tensor, rows: Tensor, temp: float) -> Tensor:
    """The distributions that a forward pass stands for."""
    prototypes = Prototypes(rows)
    row, col = centering(z, prototypes, temp)
    pairs, weight = cross_view_pairs(len(z), len(z)), torch.ones(z.shape[1], dtype=z.dtype)
    return Targets(z, prototypes, row, col, temp, pairs, weight).probs()


@settings(max_examples=25)
@given(
    seed=st.integers(0, 1000),
    num_crops=st.integers(2, 3),
    num_images=st.integers(1, 5),
    num_prototypes=st.integers(1, 20),
    temp=st.floats(0.02, 1.0),
    momentum=st.floats(0.0, 1.0),
)
def test_steps_equal_equation_4_written_out(
    seed: int, num_crops: int, num_images: int, num_prototypes: int, temp: float, momentum: float
) -> None:
    """Each step sharpens by the center of the steps before it, then moves it by its own mean."""
    torch.manual_seed(seed)
    centering = EMACentering(num_prototypes, momentum).double()
    center = torch.zeros(num_prototypes, dtype=torch.float64)
    for _ in range(3):
        z, prototypes = unit(num_crops, num_images, 6), unit(num_prototypes, 6)
        logits = z @ prototypes.T
        wanted = torch.softmax((logits - center) / temp, dim=-1)
        torch.testing.assert_close(probs(centering, z, prototypes, temp), wanted)
        torch.testing.assert_close(centering.center, center, rtol=1e-12, atol=1e-14)
        centering.after_step(YES)
        center = oracle.center_ema(center, logits, momentum)
    torch.testing.assert_close(centering.center, center, rtol=1e-12, atol=1e-14)


def test_a_skipped_step_leaves_the_center() -> None:
    """Its mean, NaN and all, is dropped; the next good step starts from where the center was."""
    centering = EMACentering(10).double()
    rows = unit(10, 6)
    prototypes = Prototypes(rows)
    centering(unit(2, 3, 6), prototypes, 0.04)
    centering.after_step(YES)
    before = centering.center.clone()
    assert before.any()
    centering(torch.full((2, 3, 6), float("nan"), dtype=torch.float64), prototypes, 0.04)
    centering.after_step(NO)
    assert torch.equal(centering.center, before)
    z = unit(2, 3, 6)
    centering(z, prototypes, 0.04)
    centering.after_step(YES)
    torch.testing.assert_close(centering.center, oracle.center_ema(before, z @ rows.T, 0.9))


def test_only_the_center_is_stored() -> None:
    """A checkpoint holds what the next step needs, and nothing of the step that is over."""
    assert list(EMACentering(10).state_dict()) == ["center"]
    assert not list(EMACentering(10).parameters())


def test_no_gradient_is_kept() -> None:
    """Row, column and mean are constants even where the inputs are not."""
    centering = EMACentering(10).double()
    row, col = centering(
        unit(2, 3, 6).requires_grad_(), Prototypes(unit(10, 6).requires_grad_()), 0.04
    )
    for value in (row, col, centering.batch_center):
        assert not value.requires_grad


def test_under_bfloat16_autocast_the_results_are_float32() -> None:
    """Row, column and mean, near those without autocast."""
    exact, half = EMACentering(32), EMACentering(32)
    z = unit(2, 64, 16, dtype=torch.float32)
    prototypes = Prototypes(unit(32, 16, dtype=torch.float32))
    exact(z, prototypes, 0.04)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        row, col = half(z, prototypes, 0.04)
    assert row.dtype == col.dtype == half.batch_center.dtype == torch.float32
    torch.testing.assert_close(half.batch_center, exact.batch_center, rtol=0.02, atol=1e-3)


@pytest.mark.parametrize("temp", [0.04, 1e-3])
def test_sharp_temperatures_stay_finite(temp: float) -> None:
    """The row term is a logsumexp, so no exponential overflows in float32."""
    found = probs(EMACentering(10), unit(2, 3, 6, dtype=torch.float32), torch.eye(10, 6), temp)
    assert torch.isfinite(found).all()
    torch.testing.assert_close(found.sum(-1), torch.ones(2, 3), rtol=1e-3, atol=0.0)


def test_no_rows_leave_the_center() -> None:
    """A batch without masked patches: a mean over nothing is not taken, and nothing is NaN."""
    centering = EMACentering(10).double()
    prototypes = Prototypes(unit(10, 6))
    centering(unit(2, 3, 6), prototypes, 0.04)
    centering.after_step(YES)
    before = centering.center.clone()
    row, col = centering(unit(1, 0, 6), prototypes, 0.04)
    centering.after_step(YES)
    assert row.shape == (1, 0)
    assert torch.isfinite(col).all()
    assert torch.equal(centering.center, before)


# ------------------------------------------------------------------------------------ Sinkhorn


@settings(max_examples=40)
@given(
    seed=st.integers(0, 1000),
    num_crops=st.integers(1, 3),
    num_images=st.integers(1, 5),
    num_prototypes=st.integers(1, 20),
    num_iterations=st.integers(1, 5),
    temp=st.floats(0.04, 1.0),
    scaled=st.booleans(),
)
def test_sinkhorn_is_the_papers_divisions(
    seed: int,
    num_crops: int,
    num_images: int,
    num_prototypes: int,
    num_iterations: int,
    temp: float,
    scaled: bool,
) -> None:
    """All crops' rows in one matrix, divided by its total, by prototypes, by rows, in turn."""
    torch.manual_seed(seed)
    z, direction = unit(num_crops, num_images, 6), unit(num_prototypes, 6)
    length = torch.rand(num_prototypes, 1, dtype=torch.float64) + 0.5 if scaled else None
    prototypes = Prototypes(direction, length)
    sinkhorn = SinkhornKnopp(num_prototypes, num_iterations)
    logits = (z @ prototypes.rows().T).flatten(0, 1)
    wanted = oracle.sinkhorn(logits, temp, num_iterations).view(num_crops, num_images, -1)
    row, col = sinkhorn(z, prototypes, temp)
    found = (z @ prototypes.rows().T / temp + row[..., None] + col).exp()
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)


def test_sinkhorn_gives_the_references_numbers() -> None:
    """What the official code makes of sin(0), sin(1), ... at temperature 0.07."""
    z = torch.sin(torch.arange(48.0)).view(2, 3, 8)
    three = [1e-6, 0.208390, 0.760046, 8e-6, 0, 0, 0, 0.031555]
    sums = [0.690824, 0.650131, 0.850070, 0.910574, 0.781161, 0.787878, 0.731894, 0.597468]
    one = [1e-6, 0.094796, 0.892917, 9e-6, 0, 0, 0, 0.012277]
    q = probs(SinkhornKnopp(8), z, torch.eye(8), 0.07)
    assert q[0, 0].tolist() == pytest.approx(three, abs=1e-6)
    assert q.sum((0, 1)).tolist() == pytest.approx(sums, abs=2e-6)
    q = probs(SinkhornKnopp(8, num_iterations=1), z, torch.eye(8), 0.07)
    assert q[0, 0].tolist() == pytest.approx(one, abs=1e-6)


def test_many_iterations_give_every_prototype_the_same_share() -> None:
    """And every row a distribution: the matrix is doubly stochastic but for a factor."""
    q = probs(SinkhornKnopp(10, num_iterations=500), unit(2, 15, 6), unit(10, 6), 0.2)
    torch.testing.assert_close(q.sum((0, 1)), torch.full((10,), 3.0).double(), rtol=1e-6, atol=0.0)
    torch.testing.assert_close(q.sum(-1), torch.ones(2, 15).double())


def test_sinkhorn_of_logits_of_a_thousand_is_finite() -> None:
    """In float32, over a temperature of 0.04: rows sum to one within the logits' own roundings."""
    z = 1e3 * (2 * torch.rand(2, 9, 7) - 1)
    z[0, 0], z[0, 1], z[0, 2, 0] = 1e3, -1e3, 1e3
    row, col = SinkhornKnopp(7)(z, Prototypes(torch.eye(7)), 0.04)
    assert torch.isfinite(row).all()
    assert torch.isfinite(col).all()
    q = probs(SinkhornKnopp(7), z, torch.eye(7), 0.04)
    torch.testing.assert_close(q.sum(-1), torch.ones(2, 9), rtol=0.02, atol=0.0)


def test_sinkhorn_of_no_rows_is_finite() -> None:
    """A batch without masked patches."""
    row, col = SinkhornKnopp(10)(unit(1, 0, 6), Prototypes(unit(10, 6)), 0.04)
    assert row.shape == (1, 0)
    assert torch.isfinite(col).all()


def test_sinkhorn_keeps_nothing() -> None:
    """No state in a checkpoint, no gradient, and nothing of the step before."""
    sinkhorn = SinkhornKnopp(10)
    z, prototypes = unit(2, 3, 6).requires_grad_(), Prototypes(unit(10, 6).requires_grad_())
    first = sinkhorn(z, prototypes, 0.04)
    sinkhorn.after_step(YES)
    assert not sinkhorn.state_dict()
    assert not any(term.requires_grad for term in first)
    torch.testing.assert_close(sinkhorn(z, prototypes, 0.04), first, rtol=0.0, atol=0.0)


def test_sinkhorn_of_bfloat16_is_float32() -> None:
    """The same as of the rounded numbers in float32, with autocast or without."""
    z, rows = unit(2, 5, 6).bfloat16(), unit(10, 6).bfloat16()
    wanted = SinkhornKnopp(10)(z.float(), Prototypes(rows.float()), 0.04)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = SinkhornKnopp(10)(z, Prototypes(rows), 0.04)
    assert found[0].dtype == found[1].dtype == torch.float32
    torch.testing.assert_close(found, wanted)


def test_sinkhorn_without_iterations_is_refused() -> None:
    """In a sentence, when it is built."""
    with pytest.raises(UserError, match="num_iterations=0"):
        SinkhornKnopp(10, num_iterations=0)


class Largest(TorchDispatchMode):
    """Watches the number of values of the largest tensor that anything makes."""

    num_values = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for one in out if isinstance(out, tuple | list) else [out]:
            if isinstance(one, Tensor):
                self.num_values = max(self.num_values, one.numel())
        return out


@pytest.mark.parametrize("name", ["ema", "sinkhorn"])
@pytest.mark.parametrize("num_rows", [1, 3, 7])
def test_chunks_bound_the_logits_and_change_nothing(
    name: str, num_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twenty rows of a hundred prototypes: no more than `num_rows` of them are held at once."""
    z = unit(2, 10, 6)
    prototypes = Prototypes(unit(100, 6), torch.rand(100, 1).double() + 0.5)
    make = {"ema": lambda: EMACentering(100).double(), "sinkhorn": lambda: SinkhornKnopp(100)}[name]
    wanted = make()(z, prototypes, 0.1)
    monkeypatch.setitem(LOGITS_BYTES, "cpu", num_rows * 100 * 8)
    with Largest() as largest:
        found = make()(z, prototypes, 0.1)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    assert largest.num_values <= max(num_rows * 100, prototypes.direction.numel())


# ------------------------------------------------------------------------------------ one process


def test_collectives_do_nothing_in_one_process() -> None:
    """No group, no change, no wait."""
    value = torch.tensor([1.0, 2.0])
    assert distributed.all_reduce_mean_(value) is value
    assert value.tolist() == [1.0, 2.0]
    assert distributed.broadcast_value(0.1, torch.device("cpu")) == 0.1
    assert distributed.world_size() == 1
    assert not distributed.is_distributed()


@pytest.mark.parametrize(
    ("environment", "rank"),
    [
        ({}, 0),
        ({"RANK": "3", "LOCAL_RANK": "1"}, 3),
        ({"LOCAL_RANK": "1"}, 1),
        ({"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "8"}, 5),
        ({"SLURM_PROCID": "5", "SLURM_NTASKS": "8"}, 0),
    ],
)
def test_before_the_group_is_up_the_launcher_tells_the_rank(
    environment: dict[str, str], rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torchrun's variables, Lightning's, SLURM's; an allocation alone is no launcher."""
    for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert distributed.rank() == rank


# ------------------------------------------------------------------------------------ two processes

# Logarithms of what each of two processes has to add: nothing, little, more than exp can hold.
NONE = -math.inf
MASS = torch.tensor([[NONE, NONE, 0.0, -800.0, 900.0], [NONE, 3.0, math.log(2), -801.0, 100.0]])
SHARES = [(0, 4, 7), (0, 7, 7), (0, 0, 7), (0, 0, 0)]  # rows of the first end, then the second's


def centerings() -> dict[str, Any]:
    """One of each kind, the EMA's with a past."""
    ema = EMACentering(10).double()
    ema.center.copy_(torch.arange(10.0) / 10)
    return {"ema": ema, "sinkhorn": SinkhornKnopp(10).double()}


def step_of(centering: Any, own: slice) -> dict[str, Tensor]:
    """Distributions, column term and the center after a step on some rows of two crops' seven."""
    torch.manual_seed(0)
    z, prototypes = unit(2, 7, 6), Prototypes(unit(10, 6))
    row, col = centering(z[:, own], prototypes, 0.1)
    centering.after_step(YES)
    logits = z[:, own] @ prototypes.rows().T / 0.1
    q = (logits + row[..., None] + col).exp()
    return {"q": q, "col": col, **centering.state_dict()}


NUM_STEPS, NUM_IMAGES = 3, 4


class Colors(Backbone):
    """A backbone of one map from mean colors: quick to import, and all that a step needs."""

    embed_dim, num_blocks = 6, 0

    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(3, self.embed_dim)

    def forward(self, images: Tensor, mask: Tensor | None = None, cls_only: bool = False) -> Tokens:
        cls = self.map(images.mean(dim=(2, 3)))
        return Tokens(cls=cls, patches=cls[:, None], registers=None, grid=(1, 1))

    def depth_of(self, name: str) -> int:
        return 0


def batch(number: int) -> Crops:
    """Two global and two local crops of four images, the same on every rank."""
    torch.manual_seed(100 + number)
    large = torch.randn(2, NUM_IMAGES, 3, 4, 4, dtype=torch.float64)
    small = torch.randn(2, NUM_IMAGES, 3, 2, 2, dtype=torch.float64)
    nothing = torch.zeros(4, NUM_IMAGES, 4)
    return Crops(large, small, torch.arange(NUM_IMAGES), None, boxes=nothing, draws=nothing)


def train(first: int, last: int, micro: int, exchange: bool) -> dict[str, Tensor]:
    """Three steps of DINO on images first to last of each batch, gradients exchanged at the end."""
    torch.manual_seed(1)
    head = partial(DINOHead, num_prototypes=10, hidden_dim=8, bottleneck_dim=4, num_layers=2)
    method = DINO(Colors(), head, Cosine(0.9, 1.0), Constant(0.05)).double()
    syncing, num_syncs = True, 0

    @contextmanager
    def no_sync() -> Iterator[None]:
        nonlocal syncing
        syncing = False
        yield
        syncing = True

    def backward(total: Tensor) -> None:
        nonlocal num_syncs
        total.backward()
        if exchange and syncing:
            num_syncs += 1
            for parameter in method.student.parameters():
                if parameter.grad is not None:
                    distributed.all_reduce_mean_(parameter.grad)

    step = Step(
        method,
        {"dino": PrototypeLoss("cls", Constant(1.0))},
        torch.optim.AdamW(param_groups(method.student), fused=True),
        learning_rate=Cosine(1e-2, 1e-4, warmup="1 step"),
        weight_decay=Cosine(0.04, 0.4),
        clip=0.1,
        micro_batch_size=micro,
        backward=backward,
        no_sync=no_sync,
    )
    losses = [
        step(batch(i).part(first, last), Progress(i, NUM_STEPS + 1, 1))["loss"]
        for i in range(NUM_STEPS)
    ]
    assert num_syncs == (NUM_STEPS if exchange else 0)  # once a step, on the last micro-batch
    return {**method.state_dict(), "losses": torch.stack(losses)}


def two_ranks(rank: int) -> dict[str, Any]:
    """One of two processes: every collective of the core, then training on half of each batch."""
    found: dict[str, Any] = {"rank": distributed.rank(), "world": distributed.world_size()}
    found["mean"] = distributed.all_reduce_mean_(torch.tensor([1.0, 10.0]) * (rank + 1))
    found["sum"] = distributed.all_reduce_sum_(torch.tensor([1.0, 10.0]) * (rank + 1))
    found["broadcast"] = distributed.broadcast_value(0.1 + rank, torch.device("cpu"))
    found["logsumexp"] = distributed.all_reduce_logsumexp(MASS[rank])
    half = NUM_IMAGES // 2
    for micro in (0, 1):
        found[f"train{micro}"] = train(rank * half, (rank + 1) * half, micro, exchange=True)
    for bounds in SHARES:
        for name, centering in centerings().items():
            own = slice(bounds[rank], bounds[rank + 1])
            found[f"{name}{bounds}"] = step_of(centering, own)
    return found


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    """What two gloo processes found."""
    return on_ranks(2, two_ranks)


def test_two_processes_average_and_listen_to_rank_0(ranks: list[dict[str, Any]]) -> None:
    """A sum, the same divided by the world's size, and rank 0's number to float64's last bit."""
    for rank, found in enumerate(ranks):
        assert (found["rank"], found["world"]) == (rank, 2)
        assert found["sum"].tolist() == [3.0, 30.0]
        assert found["mean"].tolist() == [1.5, 15.0]
        assert found["broadcast"] == 0.1


def test_two_processes_add_up_what_they_have_the_logarithms_of(ranks: list[dict[str, Any]]) -> None:
    """However large or small, and where one of them, or both, have nothing."""
    for found in ranks:
        torch.testing.assert_close(found["logsumexp"], MASS.logsumexp(0))


@pytest.mark.parametrize("bounds", SHARES)
@pytest.mark.parametrize("name", ["ema", "sinkhorn"])
def test_rows_are_centered_alike_however_two_processes_share_them(
    ranks: list[dict[str, Any]], name: str, bounds: tuple[int, ...]
) -> None:
    """Unequal shares, all rows on one of them, none at all: the same as in one process."""
    wanted = step_of(centerings()[name], slice(0, bounds[-1]))
    found = [rank[f"{name}{bounds}"] for rank in ranks]
    q = torch.cat([one.pop("q") for one in found], dim=1)
    torch.testing.assert_close(q, wanted.pop("q"), rtol=1e-12, atol=1e-15)
    for one in found:
        torch.testing.assert_close(one, wanted, rtol=1e-12, atol=1e-14)
        assert all(torch.isfinite(value).all() for value in one.values())


@pytest.mark.parametrize("micro", [0, 1])
def test_two_processes_train_as_one_with_the_joint_batch(
    ranks: list[dict[str, Any]], micro: int
) -> None:
    """2×1 and 2×2 equal 1×1 in float64: student, teacher, center, and the mean of the losses."""
    wanted = train(0, NUM_IMAGES, micro=0, exchange=False)
    first, second = (found[f"train{micro}"] for found in ranks)
    losses = (first.pop("losses") + second.pop("losses")) / 2
    torch.testing.assert_close(losses, wanted.pop("losses"), rtol=1e-10, atol=0.0)
    assert wanted["centering.center"].any()
    for name, value in wanted.items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], value, rtol=1e-8, atol=1e-9)


def test_under_bfloat16_autocast_the_center_keeps_float32s_digits() -> None:
    """A mean is moved a thousand times: rounding it to 8 bits would move the center itself."""
    exact, half = EMACentering(32), EMACentering(32)
    z = unit(2, 64, 16, dtype=torch.float32)
    prototypes = Prototypes(unit(32, 16, dtype=torch.float32))
    exact(z, prototypes, 0.04)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        row, col = half(z, prototypes, 0.04)
    assert row.dtype == col.dtype == half.batch_center.dtype == torch.float32
    torch.testing.assert_close(half.batch_center, exact.batch_center, rtol=1e-5, atol=1e-6)
