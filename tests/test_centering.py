"""The EMA center by formula, skipped steps, half precision; and two processes against one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import oracle
from dino_lite import distributed
from dino_lite.contracts import Crops, Progress, Prototypes, Targets, Tokens
from dino_lite.losses.prototype import PrototypeLoss, cross_view_pairs
from dino_lite.methods.dino import DINO
from dino_lite.methods.step import Step
from dino_lite.nn.centering import EMACentering
from dino_lite.nn.heads import DINOHead
from dino_lite.optim.param_groups import param_groups
from dino_lite.optim.schedules import Constant, Cosine

YES, NO = torch.tensor(True), torch.tensor(False)


def unit(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Rows of unit norm."""
    return F.normalize(torch.randn(*shape, dtype=dtype), dim=-1)


def probs(centering: EMACentering, z: Tensor, rows: Tensor, temp: float) -> Tensor:
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
        ({"SLURM_PROCID": "5", "SLURM_NTASKS": "8"}, 5),
        ({"SLURM_PROCID": "5"}, 0),
    ],
)
def test_before_the_group_is_up_the_launcher_tells_the_rank(
    environment: dict[str, str], rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torchrun's variables, Lightning's, SLURM's; an allocation alone is no launcher."""
    for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID", "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert distributed.rank() == rank


# ------------------------------------------------------------------------------------ two processes

NUM_STEPS, NUM_IMAGES = 3, 4


class Colors(nn.Module):
    """A backbone of one map from mean colors: quick to import, and all that a step needs."""

    embed_dim, num_blocks = 6, 0

    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(3, self.embed_dim)

    def forward(self, images: Tensor, cls_only: bool = False) -> Tokens:
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


def worker(rank: int, folder: str) -> None:
    """One of two processes: every collective of the core, then training on half of each batch."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    found: dict[str, Any] = {"rank": distributed.rank(), "world": distributed.world_size()}
    found["mean"] = distributed.all_reduce_mean_(torch.tensor([1.0, 10.0]) * (rank + 1))
    found["broadcast"] = distributed.broadcast_value(0.1 + rank, torch.device("cpu"))
    half = NUM_IMAGES // 2
    for micro in (0, 1):
        found[f"train{micro}"] = train(rank * half, (rank + 1) * half, micro, exchange=True)
    torch.save(found, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What two gloo processes found."""
    folder = tmp_path_factory.mktemp("gloo")
    spawn: Callable[..., Any] = mp.spawn
    spawn(worker, args=(str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def test_two_processes_average_and_listen_to_rank_0(ranks: list[dict[str, Any]]) -> None:
    """A sum divided by the world's size, and rank 0's number to float64's last bit."""
    for rank, found in enumerate(ranks):
        assert (found["rank"], found["world"]) == (rank, 2)
        assert found["mean"].tolist() == [1.5, 15.0]
        assert found["broadcast"] == 0.1


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
