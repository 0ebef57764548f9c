"""The EMA teacher: a copy that follows by formula and never learns by gradient."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import oracle
from dino_lite.backbones.vit import ViT
from dino_lite.contracts import Progress
from dino_lite.methods.dino import Student
from dino_lite.nn.heads import DINOHead
from dino_lite.nn.teachers import EMATeacher, ema_, frozen_copy
from dino_lite.optim.schedules import Constant, Cosine

YES, NO = torch.tensor(True), torch.tensor(False)


def student(drop_path: float = 0.0, batch_norm: bool = False) -> Student:
    """A small backbone and head."""
    backbone = ViT(
        image_size=16, patch_size=8, embed_dim=8, depth=3, num_heads=2, drop_path=drop_path
    )
    return Student(backbone, DINOHead(8, 12, 8, 4, 2, batch_norm))


def drop_probs(module: nn.Module) -> list[float]:
    """The probability of each stochastic depth in a network."""
    return [m.drop_prob for m in module.modules() if type(m).__name__ == "DropPath"]


def wander(module: nn.Module) -> None:
    """Stand in for an optimizer step."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter))


def test_a_teacher_starts_as_the_student_with_storage_of_its_own() -> None:
    """Backbone and head, parameters and buffers: equal values, other memory."""
    network = student(batch_norm=True)
    network.head(torch.randn(4, 8))  # running statistics are copied too
    teacher = EMATeacher(network, Constant(0.9)).module
    ours, theirs = network.state_dict(keep_vars=True), teacher.state_dict(keep_vars=True)
    assert ours.keys() == theirs.keys()
    assert {name.partition(".")[0] for name in ours} == {"backbone", "head"}
    assert ours["head.mlp.1.running_mean"].any()
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name
        assert value.untyped_storage().data_ptr() != theirs[name].untyped_storage().data_ptr(), name


def test_a_teacher_takes_no_gradient() -> None:
    """No parameter requires one, and the student's still do."""
    network = student()
    teacher = EMATeacher(network, Constant(0.9)).module
    assert not any(p.requires_grad for p in teacher.parameters())
    frozen = {n for n, p in network.named_parameters() if not p.requires_grad}
    assert frozen == {"head.last_layer.weight_g"}


def test_a_teacher_drops_no_paths_and_the_student_still_does() -> None:
    """In train mode the teacher answers the same twice, the student does not."""
    network = student(drop_path=0.5)
    before = drop_probs(network)
    teacher = frozen_copy(network)
    assert max(before) == 0.5
    assert drop_probs(network) == before
    assert set(drop_probs(teacher)) <= {0.0}
    assert teacher.training
    images = torch.randn(16, 3, 16, 16)
    assert torch.equal(teacher.backbone(images).cls, teacher.backbone(images).cls)
    assert not torch.equal(network.backbone(images).cls, network.backbone(images).cls)


def test_n_steps_equal_the_average_written_out() -> None:
    """Momentum follows its schedule, and every parameter is averaged after the student's step."""
    network = student().double()
    schedule = Cosine(0.5, 1.0)
    teacher = EMATeacher(network, schedule)
    wanted = {name: p.detach().clone() for name, p in network.named_parameters()}
    for step in range(6):
        wander(network)
        at = Progress(step, 7, 7)
        for name, p in network.named_parameters():
            wanted[name] = oracle.ema(wanted[name], p.detach(), schedule(at))
        teacher.after_step(network, at, YES)
    for name, p in teacher.module.named_parameters():
        torch.testing.assert_close(p, wanted[name], rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("momentum", [0.0, 0.9, 1.0])
def test_a_skipped_step_changes_no_bit(momentum: float) -> None:
    """Where ok is false the teacher stays, whatever the student became."""
    network = student()
    teacher = EMATeacher(network, Constant(momentum))
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    wander(network)
    teacher.after_step(network, Progress(0, 10, 10), NO)
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


def test_a_momentum_of_one_stands_and_of_zero_copies() -> None:
    """The two ends of the rule."""
    network = student()
    still, swift = EMATeacher(network, Constant(1.0)), EMATeacher(network, Constant(0.0))
    before = [p.clone() for p in still.module.parameters()]
    wander(network)
    for teacher in (still, swift):
        teacher.after_step(network, Progress(0, 10, 10), YES)
    assert all(torch.equal(a, b) for a, b in zip(still.module.parameters(), before, strict=True))
    for a, b in zip(swift.module.parameters(), network.parameters(), strict=True):
        torch.testing.assert_close(a, b.detach())


def test_statistics_of_batch_norms_are_not_averaged() -> None:
    """The student's running mean moves, the teacher's own stays."""
    network = student(batch_norm=True)
    teacher = EMATeacher(network, Constant(0.5))
    before = {name: value.clone() for name, value in teacher.module.named_buffers()}
    network.head(5 + torch.randn(16, 8))
    teacher.after_step(network, Progress(0, 10, 10), YES)
    buffers = dict(teacher.module.named_buffers())
    assert "head.mlp.1.running_mean" in buffers
    assert all(torch.equal(value, before[name]) for name, value in buffers.items())
    assert not torch.equal(network.head.mlp[1].running_mean, buffers["head.mlp.1.running_mean"])


def test_averages_keep_their_precision() -> None:
    """A float64 teacher stays float64 and its averages exact to it."""
    average: list[Tensor] = [torch.ones(3, dtype=torch.float64)]
    ema_(average, [torch.zeros(3, dtype=torch.float64)], 1 - 1e-12, YES)
    assert average[0].dtype == torch.float64
    torch.testing.assert_close(
        1 - average[0], torch.full((3,), 1e-12, dtype=torch.float64), rtol=1e-3, atol=0
    )


def test_teacher_drops_no_activations_either() -> None:
    """Dropout anywhere in a network is silent in the teacher as drop path is."""
    teacher = frozen_copy(nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5)))
    features = torch.randn(2, 8)
    assert torch.equal(teacher(features), teacher(features))
