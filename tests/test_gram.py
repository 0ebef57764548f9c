"""Gram anchoring against plain loops: value, gradient, grids, weights, half precision."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import oracle
from dino_lite.contracts import Anchor, Match, Progress, Prototypes, Scores, Tokens
from dino_lite.losses import gram
from dino_lite.losses.gram import GramLoss, gram_distance, regrid
from dino_lite.optim.schedules import Constant


def randn(*shape: int) -> Tensor:
    """Normal numbers."""
    return torch.randn(*shape, dtype=torch.float64)


def tokens(patches: Tensor, grid: tuple[int, int]) -> Tokens:
    """Rows "G*n" of patches."""
    return Tokens(patches[:, 0], patches, None, grid)


@settings(max_examples=30)
@given(
    seed=st.integers(0, 10_000),
    num_patches=st.integers(1, 5),
    width=st.integers(1, 4),
    other=st.integers(1, 4),
)
def test_value_and_gradient_are_the_loops(
    seed: int, num_patches: int, width: int, other: int
) -> None:
    """All pairs of patches of each image; the anchor's width may be another and learns nothing."""
    torch.manual_seed(seed)
    ours, theirs = randn(3, num_patches, width), randn(3, num_patches, other)
    ours.requires_grad_(), theirs.requires_grad_()
    found = gram_distance(ours, theirs)
    wanted = torch.stack([oracle.gram(a, b.detach()) for a, b in zip(ours, theirs, strict=True)])
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-14)
    factor = torch.rand(3, dtype=torch.float64)
    slopes = [torch.autograd.grad(factor @ value, ours)[0] for value in (found, wanted)]
    torch.testing.assert_close(slopes[0], slopes[1], rtol=1e-8, atol=1e-12)
    assert not torch.autograd.grad(gram_distance(ours, theirs).sum(), theirs, allow_unused=True)[0]


def test_equal_patches_cost_exactly_nothing() -> None:
    """Whatever their lengths: zero, and no gradient that would move them."""
    ours = torch.randn(4, 9, 8).requires_grad_()
    value = gram_distance(ours, ours.detach() * 2)
    assert not value.any()
    value.sum().backward()
    assert not ours.grad.any()


def test_turned_patches_cost_nothing() -> None:
    """Only how patches lie to each other counts: a rotation of all of them is free."""
    ours, turn = randn(2, 9, 6), torch.linalg.qr(randn(6, 6)).Q
    assert float(gram_distance(ours, ours @ turn).max()) < 1e-28


def test_negative_likeness_may_be_left_out() -> None:
    """Cosines below zero count as zero in both."""
    ours = torch.tensor([[[1.0, 0.0], [-1.0, 0.0]]])
    theirs = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    assert gram_distance(ours, theirs).tolist() == [0.5]
    assert gram_distance(ours, theirs, remove_negative=True).tolist() == [0.0]
    assert gram_distance(theirs, ours, remove_negative=True).tolist() == [0.0]


def test_a_finer_grid_is_resampled_before_it_is_normalized() -> None:
    """By Keys' cubic as wide as a coarse cell; long patches then weigh more than short ones."""
    fine, ours = randn(1, 2, 8 * 6, 5), randn(2, 4 * 3, 7)
    fine = fine * (1 + 9 * torch.rand(1, 2, 48, 1))
    maps = fine[0].mT.unflatten(2, (8, 6))  # n D rows columns
    coarse = torch.stack([torch.stack([oracle.shrink(m, 4, 3) for m in image]) for image in maps])
    torch.testing.assert_close(regrid(fine[0], (8, 6), (4, 3)), coarse.flatten(2).mT)
    wanted = [oracle.gram(a, b) for a, b in zip(ours, coarse.flatten(2).mT, strict=True)]
    anchor = Anchor(regrid(fine[0], (8, 6), (4, 3))[None], torch.tensor([0.3, 0.7]).double())
    found = GramLoss("gram", Constant(2.0))(Match(tokens(ours, (4, 3)), anchor))
    torch.testing.assert_close(found, 0.3 * wanted[0] + 0.7 * wanted[1], rtol=1e-6, atol=0.0)


def test_rows_are_crop_major_and_weights_the_images() -> None:
    """Two crops of three images: the mean over crops of the sum over images."""
    ours, theirs = randn(6, 4, 5), randn(2, 3, 4, 5)
    weight = torch.rand(3, dtype=torch.float64)
    loss = GramLoss("gram", Constant(2.0))
    found = loss(Match(tokens(ours, (2, 2)), Anchor(theirs, weight)))
    by_image = [oracle.gram(ours[3 * g + i], theirs[g, i]) for g in range(2) for i in range(3)]
    torch.testing.assert_close(found, torch.stack(by_image) @ weight.repeat(2) / 2)
    assert loss.reads == "gram"
    assert loss.weight(Progress(0, 1, 1)) == 2.0


def test_parts_of_a_batch_sum_to_the_whole() -> None:
    """Micro-batches keep the weights they had in the batch, so values and gradients add up."""
    ours, theirs = randn(2, 5, 4, 3).requires_grad_(), randn(2, 5, 4, 6)
    anchor, loss = Anchor(theirs, torch.full((5,), 0.2)), GramLoss("gram", Constant(1.0))
    whole = loss(Match(tokens(ours.flatten(0, 1), (2, 2)), anchor))
    total = torch.zeros(()).double()
    for start, stop in ((0, 2), (2, 4), (4, 5)):
        part = tokens(ours[:, start:stop].flatten(0, 1), (2, 2))
        total = total + loss(Match(part, anchor.part(start, stop)))
    torch.testing.assert_close(total, whole)
    slopes = [torch.autograd.grad(value, ours)[0] for value in (total, whole)]
    torch.testing.assert_close(slopes[0], slopes[1])


def test_half_precision_is_computed_in_float32() -> None:
    """The value of the rounded patches, with autocast or without."""
    ours, theirs = torch.randn(2, 9, 8).bfloat16(), torch.randn(1, 2, 9, 8).bfloat16()
    loss, weight = GramLoss("gram", Constant(1.0)), torch.full((2,), 0.5)
    wanted = loss(Match(tokens(ours.float(), (3, 3)), Anchor(theirs.float(), weight)))
    ours.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = loss(Match(tokens(ours, (3, 3)), Anchor(theirs, weight)))
    found.backward()
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.detach(), wanted)
    assert torch.isfinite(ours.grad).all()


def test_scores_are_no_tokens() -> None:
    """A match of the wrong kind is a programmer's mistake and says which loss met it."""
    scores = Scores(torch.zeros(1, 2, 3), Prototypes(torch.eye(3)))
    anchor = Anchor(torch.zeros(1, 2, 4, 3), torch.full((2,), 0.5))
    with pytest.raises(TypeError, match="gram"):
        GramLoss("gram", Constant(1.0))(Match(scores, anchor))


def test_matrices_held_a_few_at_a_time_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Values and slopes of images one by one, made again on the way back."""
    student = torch.randn(5, 6, 4, dtype=torch.float64)
    anchor = torch.randn(5, 6, 3, dtype=torch.float64)
    found = []
    for held in (gram.MATRIX_BYTES, 1):
        monkeypatch.setattr(gram, "MATRIX_BYTES", held)
        ours = student.clone().requires_grad_()
        distance = gram.gram_distance(ours, anchor)
        distance.sum().backward()
        found.append((distance.detach(), ours.grad))
    torch.testing.assert_close(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][1], found[1][1])
