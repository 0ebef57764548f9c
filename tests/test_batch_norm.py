"""Batch normalization of several processes is that of one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor, nn

from dino_lite.config import compose
from dino_lite.contracts import UserError
from dino_lite.nn.batch_norm import BatchNorm, across_ranks
from dino_lite.runs.pretraining import run_pretrain
from ranks import command, on_ranks
from test_pretrain import assert_same
from tiny import checkpoint

SIZES = {"maps": (8, 5, 3, 2), "rows": (8, 5)}
PARTS = {"5 and 3": 5, "8 and none": 8, "none and 8": 0}  # where the second process begins


def make(kind: str) -> nn.Module:
    """Torch's, in float64, with generic weights."""
    norm = (nn.BatchNorm2d if kind == "maps" else nn.BatchNorm1d)(5, momentum=0.3).double()
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    return norm


def run(norm: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Outputs of two passes, the slopes of one number that reads the second, and what is kept."""
    x = x.clone().requires_grad_()
    first = norm(x + 1)
    second = norm(x)
    (second * y).sum().backward()
    slopes = {name: p.grad for name, p in norm.named_parameters() if p.grad is not None}
    assert x.grad is not None
    found = {"first": first.detach(), "second": second.detach(), "slope": x.grad}
    return found | slopes | {f"kept_{name}": value for name, value in norm.named_buffers()}


def batch(kind: str) -> tuple[Tensor, Tensor]:
    """Images far from zero, and what reads them."""
    torch.manual_seed(3)
    x, y = torch.randn(2, *SIZES[kind], dtype=torch.float64)
    return x * 3 + 1000, y


def part(rank: int, kind: str, parts: str) -> dict[str, Tensor]:
    """One of two processes."""
    cut = (slice(None, PARTS[parts]), slice(PARTS[parts], None))[rank]
    torch.manual_seed(1)
    norm = make(kind)
    across_ranks(norm)
    x, y = batch(kind)
    return run(norm, x[cut], y[cut])


@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("kind", SIZES)
def test_two_processes_normalize_as_one(kind: str, parts: str) -> None:
    """Values, slopes of images and weights, running statistics, however images are shared."""
    torch.manual_seed(1)
    alone = run(make(kind), *batch(kind))
    both = on_ranks(2, part, kind, parts)
    for name in ("first", "second", "slope"):
        torch.testing.assert_close(torch.cat([found[name] for found in both]), alone[name])
    for name in ("weight", "bias"):
        torch.testing.assert_close(both[0][name] + both[1][name], alone[name])
    for found in both:
        for name in (name for name in alone if name.startswith("kept_")):
            torch.testing.assert_close(found[name], alone[name])


def test_names_and_weights_stay_and_one_process_has_torchs() -> None:
    """Only the class changes, of those within as well; evaluation reads what was kept."""
    network: Any = nn.Sequential(make("maps"), nn.Sequential(nn.Conv2d(5, 5, 1), make("maps")))
    network = network.double()
    x, _ = batch("maps")
    names, wanted = list(network.state_dict()), network(x)
    network.eval()
    still = network(x)
    across_ranks(network)
    assert list(network.state_dict()) == names
    assert [type(part) for part in network.modules()].count(BatchNorm) == 2
    assert torch.equal(network(x), still)
    assert torch.equal(network.train()(x), wanted)


@pytest.mark.parametrize(
    "norm",
    [
        nn.BatchNorm2d(4, affine=False),
        nn.BatchNorm2d(4, momentum=None),
        nn.BatchNorm2d(4, track_running_stats=False),
        nn.BatchNorm3d(4),
        BatchNormAct2d(4),
    ],
)
def test_one_of_another_kind_is_refused(norm: nn.Module) -> None:
    """By its name, before anything is trained."""
    with pytest.raises(UserError, match=type(norm).__name__):
        across_ranks(nn.Sequential(norm))


def halves(rank: int) -> Tensor:
    """One of two processes, in half precision; the statistics are float32's."""
    norm = nn.BatchNorm2d(2)
    across_ranks(norm)
    x = torch.tensor([1000.0, 1004.0])[rank].bfloat16().expand(3, 2, 4, 4)
    return norm(x)


def test_half_precision_keeps_its_kind_and_counts_in_float32() -> None:
    """Two processes whose images are 1000 and 1004: one standard deviation to either side."""
    first, second = on_ranks(2, halves)
    assert first.dtype == torch.bfloat16
    torch.testing.assert_close(first.float(), torch.full((3, 2, 4, 4), -1.0))
    torch.testing.assert_close(second.float(), torch.full((3, 2, 4, 4), 1.0))


@pytest.mark.slow
def test_a_run_of_two_processes_is_that_of_one(tmp_path: Path) -> None:
    """A convolutional network and a head with batch normalization, trained by the trainer."""
    words = ["data=shapes", "data.num_train=44", "data.num_test=20", "baselines=false"]
    words += ["backbone=convnet", "backbone.widths=[8,16]", "method.head.batch_norm=true"]
    words += ["augment.global_size=16", "augment.local_size=8", "loader.num_workers=0"]
    words += ["trainer.accelerator=cpu", "trainer.precision=64", "trainer.compile=false"]
    words += ["loader.batch_size=8", "trainer.max_steps=4", "~callbacks.online_eval"]
    one = run_pretrain(compose("pretrain", [*words, f"runs_dir={tmp_path / 'one'}"]))
    words += ["trainer.devices=2", f"runs_dir={tmp_path / 'two'}"]
    result = command("pretrain", *words, ranks=2)
    assert result.returncode == 0, result.stderr[-3000:]
    (folder,) = (path for path in (tmp_path / "two").iterdir() if path.is_dir())
    wanted, found = (checkpoint(run)["state_dict"] for run in (Path(one["run"]), folder))
    assert sum("running_var" in name for name in wanted) == 16  # 8 in each
    assert_same(wanted, found, tolerance=1e-9)
