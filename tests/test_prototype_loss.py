"""DINO's loss against the paper's double loop: value, gradient, chunks, parts, precision."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import oracle
from dino_lite.contracts import Match, Progress, Prototypes, Scores, Targets, Tokens, UserError
from dino_lite.losses.prototype import PrototypeLoss, cross_view_pairs, prototype_cross_entropy
from dino_lite.nn.centering import EMACentering, SinkhornKnopp
from dino_lite.optim.schedules import Constant, Warmup


def make_targets(
    teacher: Tensor, center: Tensor, temp: float, pairs: Tensor, weight: Tensor
) -> Targets:
    """Targets whose distributions are softmax((teacher − center) / temp), teacher T n K."""
    num_prototypes = teacher.shape[-1]
    col = -center / temp
    row = -(teacher / temp + col).logsumexp(-1)
    eye = torch.eye(num_prototypes, dtype=teacher.dtype)
    return Targets(teacher, Prototypes(eye), row, col, temp, pairs, weight)


def make_scores(student: Tensor) -> Scores:
    """Scores whose logits are `student`, S n K."""
    return Scores(student, Prototypes(torch.eye(student.shape[-1], dtype=student.dtype)))


def dino_targets(teacher: Tensor, center: Tensor, temp: float, num_student: int) -> Targets:
    """As a method makes them: the mean over pairs of different crops and over images."""
    weight = torch.full((teacher.shape[1],), 1 / teacher.shape[1], dtype=teacher.dtype)
    return make_targets(teacher, center, temp, cross_view_pairs(len(teacher), num_student), weight)


def randn(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Normal numbers."""
    return torch.randn(*shape, dtype=dtype)


@settings(max_examples=40)
@given(
    seed=st.integers(0, 10_000),
    num_images=st.integers(1, 4),
    num_prototypes=st.integers(2, 20),
    width=st.integers(1, 6),
    num_teacher=st.integers(1, 3),
    num_student=st.integers(1, 6),
    student_temp=st.floats(0.05, 1.0),
    teacher_temp=st.floats(0.02, 1.0),
    chunk=st.integers(0, 5),
    normalized=st.booleans(),
)
def test_value_and_gradients_are_the_double_loops(
    seed: int,
    num_images: int,
    num_prototypes: int,
    width: int,
    num_teacher: int,
    num_student: int,
    student_temp: float,
    teacher_temp: float,
    chunk: int,
    normalized: bool,
) -> None:
    """Any sizes, temperatures and weights, zeros among them; z, directions and lengths learn."""
    torch.manual_seed(seed)
    z = randn(num_student, num_images, width).requires_grad_()
    prototypes = randn(num_prototypes, width).requires_grad_()
    teacher_z, theirs = randn(num_teacher, num_images, width), randn(num_prototypes, width)
    length = randn(num_prototypes, 1).requires_grad_() if normalized else None
    unit = torch.nn.functional.normalize(prototypes, dim=-1)
    rows = prototypes if length is None else length * unit
    center = randn(num_prototypes)
    pairs = torch.rand(num_teacher, num_student, dtype=torch.float64)
    pairs = pairs * (pairs > 0.3)
    weight = torch.rand(num_images, dtype=torch.float64)
    t = make_targets(teacher_z @ theirs.T, center, teacher_temp, pairs, weight)
    targets = t._replace(z=teacher_z, prototypes=Prototypes(theirs))

    q = torch.softmax((teacher_z @ theirs.T - center) / teacher_temp, dim=-1)
    wanted = oracle.pair_loss(z @ rows.T, q, student_temp, pairs, weight)
    scores = Scores(z, Prototypes(prototypes, length))
    found = prototype_cross_entropy(scores, targets, student_temp, chunk)
    torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-12)
    learning = [z, prototypes] + ([] if length is None else [length])
    slopes = torch.autograd.grad(wanted, learning)
    for a, b in zip(torch.autograd.grad(found, learning), slopes, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("learning", ["z", "direction", "length"])
def test_what_alone_is_trained_has_the_slope_it_has_beside_others(learning: str) -> None:
    """Frozen directions, lengths or students change no other gradient."""
    inputs = {"z": randn(3, 4, 5), "direction": randn(7, 5), "length": torch.rand(7, 1).double()}
    targets = make_targets(randn(2, 4, 7), randn(7), 0.1, cross_view_pairs(2, 3), randn(4).abs())

    def slope(names: list[str]) -> Tensor:
        some = {n: t.clone().requires_grad_(n in names) for n, t in inputs.items()}
        scores = Scores(some["z"], Prototypes(some["direction"], some["length"]))
        prototype_cross_entropy(scores, targets, 0.2).backward()
        assert [n for n, t in some.items() if t.grad is not None] == names
        return some[learning].grad

    torch.testing.assert_close(slope([learning]), slope([*inputs]))


@pytest.mark.parametrize("num_local", range(9))
def test_every_number_of_local_crops_gives_the_papers_mean(num_local: int) -> None:
    """Two teacher crops against two plus `num_local` student crops, equation 3."""
    student = randn(2 + num_local, 3, 7).requires_grad_()
    teacher, center = randn(2, 3, 7), randn(7)
    wanted = oracle.dino_loss(student, teacher, center, 0.1, 0.04)
    targets = dino_targets(teacher, center, 0.04, 2 + num_local)
    found = prototype_cross_entropy(make_scores(student), targets, 0.1)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=0.0)
    (slope,) = torch.autograd.grad(wanted, student)
    torch.testing.assert_close(
        torch.autograd.grad(found, student)[0], slope, rtol=1e-10, atol=1e-14
    )


def test_pairs_are_a_mean_without_a_crop_beside_itself() -> None:
    """18 pairs with eight local crops, of equal weight, none between a crop and itself."""
    pairs = cross_view_pairs(2, 10)
    assert int((pairs > 0).sum()) == 18
    assert float(pairs.sum()) == pytest.approx(1.0, abs=1e-15)
    assert float(pairs.max()) == pytest.approx(1 / 18, abs=1e-15)
    assert not pairs.diagonal().any()


def test_the_references_two_calls_come_out() -> None:
    """Two calls of the official DINOLoss, the second with the first one's center, later in the run.

    The numbers were computed by running it: 3 images, 8 prototypes, 2 global and 2 local crops.
    """
    teacher, student = reference_logits()
    temperature = Warmup(0.04, 0.07, "30 epochs", per="epoch")
    centering, loss = EMACentering(8, momentum=0.9), PrototypeLoss("cls", Constant(1.0))
    eye = Prototypes(torch.eye(8))
    wanted = [
        (0, 11.159687, [0.018207, 0.016685, -0.000177, -0.016876]),
        (50, 11.115505, [0.034593, 0.031702, -0.000335, -0.032065]),
    ]
    for epoch, value, center in wanted:
        temp = temperature(Progress(epoch, 100, 1))
        row, col = centering(teacher, eye, temp)
        pairs, weight = cross_view_pairs(2, 4), torch.full((3,), 1 / 3)
        targets = Targets(teacher, eye, row, col, temp, pairs, weight)
        found = loss(Match(make_scores(student), targets))
        centering.after_step(torch.tensor(True))
        assert float(found) == pytest.approx(value, abs=2e-6)
        assert centering.center[:4].tolist() == pytest.approx(center, abs=1e-6)


def reference_logits() -> tuple[Tensor, Tensor]:
    """Logits of two teacher crops and of four student crops, 3 images and 8 prototypes."""
    teacher = torch.sin(torch.arange(2 * 3 * 8).float()).reshape(2, 3, 8)
    return teacher, torch.cos(0.7 * torch.arange(4 * 3 * 8).float()).reshape(4, 3, 8)


def test_the_references_second_version_is_the_mean_over_pairs_too() -> None:
    """Its parts, local crops against both teacher crops and global crops against the other, as the
    official code has them under Sinkhorn-Knopp.
    """
    teacher, student = reference_logits()
    eye = Prototypes(torch.eye(8))
    row, col = SinkhornKnopp(8)(teacher, eye, 0.07)
    both = cross_view_pairs(2, 4)
    own, others = both.clone(), both.clone()
    own[:, 2:], others[:, :2] = 0, 0
    for pairs, wanted in ((others, 7.842581), (own, 3.366689), (both, 11.209270)):
        targets = Targets(teacher, eye, row, col, 0.07, pairs, torch.full((3,), 1 / 3))
        found = prototype_cross_entropy(make_scores(student), targets, 0.1)
        assert float(found) == pytest.approx(wanted, abs=2e-6)


def test_the_references_masked_patches_come_out() -> None:
    """Three masked patches of three images, two of them of the first, none of the second."""
    teacher, student = (logits.flatten(0, 1)[None, :3] for logits in reference_logits())
    pairs, weight = torch.ones(1, 1), torch.tensor([0.5, 0.5, 1.0]) / 3
    targets = make_targets(teacher, torch.zeros(8), 0.07, pairs, weight)
    found = prototype_cross_entropy(make_scores(student), targets, 0.1)
    assert float(found) == pytest.approx(6.468050, abs=2e-6)


@pytest.mark.parametrize("chunk", [0, 3])
@pytest.mark.parametrize("normalized", [False, True])
def test_no_rows_give_zero_and_zero_gradients(chunk: int, normalized: bool) -> None:
    """A batch without masked patches: ranks wait for a gradient of every parameter, so all have
    one.
    """
    prototypes = randn(7, 5).requires_grad_()
    length = torch.rand(7, 1).double().requires_grad_() if normalized else None
    head = torch.nn.Linear(6, 5).double()
    z = head(randn(1, 0, 6))
    for centering in (EMACentering(7).double(), SinkhornKnopp(7)):
        row, col = centering(z.detach(), Prototypes(prototypes, length), 0.1)
        pairs, weight = torch.ones(1, 1), torch.ones(0).double()
        targets = Targets(z.detach(), Prototypes(prototypes), row, col, 0.1, pairs, weight)
        scores = Scores(z, Prototypes(prototypes, length))
        value = prototype_cross_entropy(scores, targets, 0.1, chunk)
        assert float(value.detach()) == 0.0
        learning = [*head.parameters(), prototypes] + ([] if length is None else [length])
        for slope in torch.autograd.grad(value, learning, retain_graph=True):
            assert not slope.any()


def test_one_logsumexp_replaces_a_log_softmax_per_pair() -> None:
    """H(q0, p) + H(q1, p) = 2·logsumexp(s) − ⟨q0 + q1, s⟩, because a distribution sums to one."""
    s, q = randn(11), torch.softmax(randn(2, 11), dim=-1)
    wanted = oracle.cross_entropy(q[0], s) + oracle.cross_entropy(q[1], s)
    torch.testing.assert_close(2 * s.logsumexp(0) - (q[0] + q[1]) @ s, wanted)
    pairs, weight = torch.ones(2, 1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    targets = make_targets(q.log()[:, None], torch.zeros(11).double(), 1.0, pairs, weight)
    found = prototype_cross_entropy(make_scores(s[None, None]), targets, 1.0)
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 6, 100])
def test_chunks_change_nothing(chunk: int) -> None:
    """Value and gradient, for chunks that divide the batch and that do not."""
    results = []
    teacher, center, start = randn(2, 6, 9), randn(9), randn(5, 6, 9)
    for size in (0, chunk):
        student = start.clone().requires_grad_()
        targets = dino_targets(teacher, center, 0.05, 5)
        value = prototype_cross_entropy(make_scores(student), targets, 0.1, size)
        value.backward()
        results.append((value.detach(), student.grad))
    torch.testing.assert_close(results[0], results[1], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_parts_of_a_batch_sum_to_the_whole(size: int) -> None:
    """Micro-batches keep the weights they had in the batch, so values and gradients add up."""
    teacher, center, start = randn(2, 6, 9), randn(9), randn(4, 6, 9)
    whole, parts = start.clone().requires_grad_(), start.clone().requires_grad_()
    targets = dino_targets(teacher, center, 0.05, 4)
    value = prototype_cross_entropy(make_scores(whole), targets, 0.1)
    value.backward()
    total = 0.0
    for i in range(0, 6, size):
        scores = make_scores(parts[:, i : i + size])
        part = prototype_cross_entropy(scores, targets.part(i, i + size), 0.1)
        part.backward()
        total += float(part.detach())
    assert total == pytest.approx(float(value.detach()), rel=1e-12)
    torch.testing.assert_close(parts.grad, whole.grad, rtol=1e-12, atol=1e-14)


def test_targets_carry_no_gradient() -> None:
    """Even where the teacher's tensors would take one."""
    teacher, theirs = randn(2, 3, 5).requires_grad_(), randn(8, 5).requires_grad_()
    student = randn(4, 3, 5).requires_grad_()
    logits = teacher @ theirs.T
    row = -(logits / 0.05).logsumexp(-1)
    weight, pairs = torch.full((3,), 1 / 3).double(), cross_view_pairs(2, 4)
    targets = Targets(
        teacher, Prototypes(theirs), row, torch.zeros(8).double(), 0.05, pairs, weight
    )
    prototype_cross_entropy(Scores(student, Prototypes(randn(8, 5))), targets, 0.1).backward()
    assert student.grad is not None
    assert teacher.grad is None
    assert theirs.grad is None


@pytest.mark.parametrize("size", [1e2, 1e3])
def test_huge_logits_stay_finite(size: float) -> None:
    """Logits of ±1e3 before the temperatures, in float32: no overflow in value or gradient."""
    student = (size * (2 * torch.rand(4, 3, 9) - 1)).requires_grad_()
    teacher = size * (2 * torch.rand(2, 3, 9) - 1)
    center = size * (2 * torch.rand(9) - 1)
    targets = dino_targets(teacher, center, 0.04, 4)
    value = prototype_cross_entropy(make_scores(student), targets, 0.1)
    value.backward()
    assert torch.isfinite(value)
    assert torch.isfinite(student.grad).all()
    wanted = oracle.dino_loss(student.detach(), teacher, center, 0.1, 0.04)
    torch.testing.assert_close(value.detach(), wanted, rtol=1e-3, atol=0.0)


def test_a_student_that_knows_nothing_pays_ln_k() -> None:
    """Equal logits for all prototypes cost ln K whatever the teacher says."""
    targets = dino_targets(randn(2, 5, 100), randn(100), 0.04, 4)
    value = prototype_cross_entropy(make_scores(torch.zeros(4, 5, 100).double()), targets, 0.1)
    assert float(value) == pytest.approx(math.log(100))


def test_a_student_that_agrees_pays_the_teachers_entropy() -> None:
    """Equal distributions: the cross-entropy is the entropy, and its gradient zero."""
    teacher = randn(1, 5, 8).expand(2, 5, 8)
    targets = dino_targets(teacher, torch.zeros(8).double(), 0.1, 2)
    student = teacher.clone().requires_grad_()
    value = prototype_cross_entropy(make_scores(student), targets, 0.1)
    value.backward()
    q = targets.probs()
    torch.testing.assert_close(value.detach(), -(q * q.log()).sum(-1).mean())
    assert float(student.grad.abs().max()) < 1e-14


def test_the_targets_distributions_sum_to_one() -> None:
    """probs() are those of softmax((z·Pᵀ − c) / temp), rows summing to one."""
    teacher, center = randn(2, 5, 8), randn(8)
    probs = dino_targets(teacher, center, 0.05, 4).probs()
    torch.testing.assert_close(probs.sum(-1), torch.ones(2, 5).double())
    torch.testing.assert_close(probs, torch.softmax((teacher - center) / 0.05, dim=-1))


def test_under_bfloat16_autocast_value_and_gradient_are_float32() -> None:
    """Only the product z·Pᵀ is half precision, so the value is near float32's."""
    z = torch.nn.functional.normalize(torch.randn(4, 5, 16), dim=-1).requires_grad_()
    prototypes = Prototypes(torch.nn.functional.normalize(torch.randn(32, 16), dim=-1))
    weight, pairs = torch.full((5,), 0.2), cross_view_pairs(2, 4)
    values = []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            row, col = EMACentering(32)(z[:2].detach(), prototypes, 0.05)
            targets = Targets(z[:2].detach(), prototypes, row, col, 0.05, pairs, weight)
            values.append(prototype_cross_entropy(Scores(z, prototypes), targets, 0.1))
    values[1].backward()
    assert values[1].dtype == z.grad.dtype == torch.float32
    torch.testing.assert_close(values[1].detach(), values[0].detach(), rtol=0.01, atol=0.0)


def test_the_adapter_applies_its_temperature_and_chunk() -> None:
    """PrototypeLoss(match) is the formula with its own settings."""
    student, targets = randn(4, 6, 9), dino_targets(randn(2, 6, 9), randn(9), 0.05, 4)
    loss = PrototypeLoss("cls", Constant(0.5), student_temp=0.3, chunk=4)
    wanted = prototype_cross_entropy(make_scores(student), targets, 0.3)
    torch.testing.assert_close(loss(Match(make_scores(student), targets)), wanted)
    assert loss.reads == "cls"
    assert loss.weight(Progress(0, 1, 1)) == 0.5


@pytest.mark.parametrize("temp", [0.0, -0.1])
def test_a_temperature_that_is_not_positive_is_refused(temp: float) -> None:
    """In a sentence, when the loss is built."""
    with pytest.raises(UserError, match=r"student_temp=.* a number above 0"):
        PrototypeLoss("cls", Constant(1.0), student_temp=temp)


def test_tokens_are_no_scores() -> None:
    """A match of the wrong kind is a programmer's mistake and says which loss met it."""
    tokens = Tokens(torch.zeros(1, 2), torch.zeros(1, 1, 2), None, (1, 1))
    with pytest.raises(TypeError, match="cls"):
        PrototypeLoss("cls", Constant(1.0))(Match(tokens, tokens))


def test_bfloat16_autocast_loses_no_digits_after_the_product() -> None:
    """From the bottleneck on all is float32, the logits and the result included."""
    z = torch.nn.functional.normalize(torch.randn(4, 5, 16), dim=-1).requires_grad_()
    prototypes = Prototypes(torch.nn.functional.normalize(torch.randn(32, 16), dim=-1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        row, col = EMACentering(32)(z[:2].detach(), prototypes, 0.05)
        weight = torch.full((5,), 0.2)
        targets = Targets(
            z[:2].detach(), prototypes, row, col, 0.05, cross_view_pairs(2, 4), weight
        )
        found = prototype_cross_entropy(Scores(z, prototypes), targets, 0.1)
    exact = torch.stack([crop @ prototypes.rows().T for crop in z.detach()])
    assert found.dtype == torch.float32
    found.backward()
    assert z.grad.dtype == torch.float32
    wanted = oracle.dino_loss(exact, exact[:2], torch.zeros(32), 0.1, 0.05)
    torch.testing.assert_close(found.detach(), wanted, rtol=1e-6, atol=0.0)
