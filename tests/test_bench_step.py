"""The bench of a step compares like with like, and says what it measured."""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dino_lite.backbones.vit import ViT
from dino_lite.contracts import Crops, Progress
from dino_lite.losses.prototype import PrototypeLoss
from dino_lite.methods.dino import DINO
from dino_lite.methods.step import Step
from dino_lite.nn.heads import DINOHead
from dino_lite.optim.param_groups import param_groups
from dino_lite.optim.schedules import Constant
from ranks import SERVER
from test_dino import random_crops


@pytest.fixture(autouse=True)
def scripts(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scripts import each other by name; the sides are forked, not started anew."""
    monkeypatch.syspath_prepend(root / "scripts")
    import step_process

    forking = SimpleNamespace(get_context=lambda method: SERVER)
    monkeypatch.setattr(step_process, "multiprocessing", forking)


def tiny_method(position_offset: float = 0.1) -> DINO:
    """The sizes of test_dino.tiny_dino, with the published code's positions and constant rates."""
    backbone = ViT(
        image_size=16,
        patch_size=8,
        embed_dim=16,
        depth=2,
        num_heads=2,
        position_offset=position_offset,
        position_antialias=position_offset == 0,
    )
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    head = partial(DINOHead, num_prototypes=24, hidden_dim=16, bottleneck_dim=8)
    return DINO(backbone, head, Constant(0.996), Constant(0.04))


def plain_of(method: DINO) -> Any:
    """The plain step with the same weights."""
    from plain_step import PlainStep

    weights = {name: value.clone() for name, value in method.student.state_dict().items()}
    return PlainStep(method.student.backbone.spec, weights, torch.device("cpu"))


def our_step(method: DINO) -> Step:
    """Ours with the published code's clipping and decay."""
    groups = param_groups(method.student, decay_tokens=True)
    return Step(
        method,
        {"dino": PrototypeLoss("cls", Constant(1.0), 0.1)},
        torch.optim.AdamW(groups, fused=True),
        learning_rate=Constant(5e-4),
        weight_decay=Constant(0.04),
        clip=3.0,
        clip_by="parameter",
    )


def as_list(crops: Crops) -> list[torch.Tensor]:
    return [*crops.globals_, *([] if crops.locals_ is None else crops.locals_)]


@pytest.mark.parametrize("position_offset", [0.0, 0.1])
@pytest.mark.parametrize("num_local", [0, 2])
def test_three_steps_of_the_plain_code_are_ours(position_offset: float, num_local: int) -> None:
    """Losses, students, teachers and centers agree in float64, where gradients are clipped too."""
    method = tiny_method(position_offset).double()
    plain, step = plain_of(method), our_step(method)
    for i in range(3):
        crops = random_crops(4, num_local, dtype=torch.float64)
        ours = step(crops, Progress(i, 3, 3))
        assert plain(as_list(crops)) == pytest.approx(float(ours["loss"]), rel=1e-9, abs=1e-9)
    assert float(ours["grad_norm"]) > 3.0
    pairs = {"student": (plain.student, method.student), "ema": (plain.teacher, method.ema.module)}
    for theirs, mine in pairs.values():
        for a, b in zip(theirs.backbone.parameters(), mine.backbone.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
        direction = theirs.head.last_layer.parametrizations.weight.original1
        torch.testing.assert_close(direction, mine.head.last_layer.weight_v, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(plain.center[0], method.centering.center.double(), rtol=1e-6, atol=0)


def test_the_plain_step_ends_where_the_loss_is_not_finite() -> None:
    """As the published code does."""
    plain, crops = plain_of(tiny_method()), random_crops()
    crops.globals_[0, 0] = math.nan
    with pytest.raises(FloatingPointError):
        plain(as_list(crops))


def test_operations_of_a_step_are_those_that_torch_counts() -> None:
    """The formula behind mfu against the plain step, product by product."""
    from bench_step import step_flops
    from step_process import Setup

    method, crops = tiny_method(), random_crops()
    plain, counter = plain_of(method), FlopCounterMode(display=False)
    with counter:
        plain(as_list(crops))
    setup = Setup("tiny", "vit", 8, 16, 8, 2, 24, 4, hidden_dim=16, bottleneck_dim=8)
    weights = method.student.state_dict()
    assert step_flops(setup, weights) == counter.get_total_flops()
    # The counter's hooks would keep our blocks from leaving out what the class token needs not.
    with (
        patch("dino_lite.backbones.layers.has_hooks", lambda _: False),
        FlopCounterMode(display=False) as counter,
    ):
        method.student.backbone(torch.cat([*crops.globals_]), cls_only=True)
        less = counter.get_total_flops()
    with FlopCounterMode(display=False) as counter:
        method.student.backbone(torch.cat([*crops.globals_]))
        less = counter.get_total_flops() - less
    ours = step_flops(setup._replace(num_local=0), weights, cls_only=True)
    assert step_flops(setup._replace(num_local=0), weights) - ours == (1 + 3) * less


@pytest.mark.slow
def test_a_bench_writes_its_numbers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every key is there, for the fastest of configurations, and both sides trained alike."""
    import bench_step

    # Two processes that import torch are enough.
    monkeypatch.setattr(bench_step, "fresh_process", lambda function, *given: function(*given))
    file = tmp_path / "bench.json"
    command = ["--config", "tiny", "--batch", "2", "--rounds", "2", "--json", str(file)]
    assert bench_step.main(command) == 0
    (found,) = json.loads(file.read_text())
    for key in ("ratio", "ratio_fp32", "memory_ratio", "trainer_overhead"):
        assert isinstance(found[key], float), key
    assert found["name"] == "tiny"
    assert found["setup"]["batch_size"] == 2
    assert found["loss_difference"]["relative"] < 1e-3
    losses = (found["fp32"] or found)["losses"]
    assert len(set(losses["ours"])) == 4
    assert "| tiny |" in capsys.readouterr().out


def test_an_unknown_configuration_is_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    """It names those there are."""
    import bench_step

    assert bench_step.main(["--config", "vit_huge"]) == 2
    assert "vit_tiny_16_224" in capsys.readouterr().err


def test_a_side_that_fails_says_why_and_leaves_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A configuration that cannot be built has an error in the JSON, and the exit code is 1."""
    import bench_step

    monkeypatch.setattr(bench_step, "TINY", bench_step.TINY._replace(local_size=9))
    file = tmp_path / "bench.json"
    assert bench_step.main(["--config", "tiny", "--rounds", "2", "--json", str(file)]) == 1
    (found,) = json.loads(file.read_text())
    assert "local_size" in found["error"]
    assert found["ratio"] is None


def test_the_side_of_a_gpu_can_be_built(tmp_path: Path) -> None:
    """Half precision is the plain side's alone; a run of ours would refuse it."""
    import bench_step
    import step_process

    student = tmp_path / "student.pt"
    step_process.save_student(bench_step.TINY, student)
    with step_process.Side("reference", bench_step.TINY, "fp16", student) as side:
        side.wait()
        assert math.isfinite(side.step(0)[1])


def test_the_plain_step_in_half_precision_is_nearly_the_other() -> None:
    """Autocast with a scaled loss, as on a GPU: the gradients that reach clipping are unscaled."""
    from plain_step import PlainStep

    method, crops = tiny_method(), random_crops()
    spec, weights = method.student.backbone.spec, method.student.state_dict()
    plain, half = (PlainStep(spec, weights, torch.device("cpu"), half=h) for h in (False, True))
    half.scaler = torch.amp.GradScaler("cpu", init_scale=4.0)  # its gradients are large
    for _ in range(2):
        assert half(as_list(crops)) == pytest.approx(plain(as_list(crops)), rel=0.05)
    norms = [
        torch.stack([p.grad.norm() for p in step.student.parameters() if p.grad is not None])
        for step in (plain, half)
    ]
    assert half.scaler.get_scale() == 4.0  # nothing overflowed
    torch.testing.assert_close(norms[1], norms[0], rtol=0.1, atol=0.05)
