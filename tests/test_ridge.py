"""The closed-form linear probe against as many fits as there are images."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dino_lite.eval.features import Features
from dino_lite.eval.ridge import ridge_correct


def loops(bank: Features, penalty: float) -> list[bool]:
    """For each image: a ridge regression with a free intercept of all the others, then the largest
    score.
    """
    x = bank.features.double()
    std = x.std(0, correction=0)
    x = (x - x.mean(0)) / torch.where(std > 0, std, torch.ones_like(std))
    classes = sorted(set(bank.labels.tolist()))
    y = torch.tensor([[float(c == label) for c in classes] for label in bank.labels.tolist()])
    x = torch.cat([x, torch.ones(len(x), 1)], dim=1)
    weigh = penalty * len(x) * torch.eye(x.shape[1], dtype=torch.float64)
    weigh[-1, -1] = 0.0
    correct = []
    for i in range(len(x)):
        others = torch.arange(len(x)) != i
        a, b = x[others], y[others].double()
        weights = torch.linalg.solve(a.T @ a + weigh, a.T @ b)
        correct.append(classes[int((x[i] @ weights).argmax())] == int(bank.labels[i]))
    return correct


@given(
    num=st.integers(3, 20),
    dim=st.integers(1, 12),
    num_classes=st.integers(2, 5),
    penalty=st.sampled_from([0.01, 0.1, 1.0]),
    seed=st.integers(0, 50),
)
def test_one_fit_is_as_many_as_there_are_images(
    num: int, dim: int, num_classes: int, penalty: float, seed: int
) -> None:
    """Right and wrong image by image, with more features than images and fewer."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(num_classes, (num,), generator=generator) * 3
    features = torch.randn(num, dim, generator=generator) + labels[:, None] * 0.2
    bank = Features(features.float(), labels)
    assert ridge_correct(bank, penalty).tolist() == loops(bank, penalty)


def test_classes_apart_are_told_apart_and_noise_is_not() -> None:
    """All of three far classes; of noise with random labels about a third, though 90 columns could
    fit 120 labels nearly by heart.
    """
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(120) % 3
    noise = torch.randn(120, 90, generator=generator)
    far = noise + 50 * torch.nn.functional.one_hot(labels, 90)
    assert bool(ridge_correct(Features(far, labels)).all())
    assert float(ridge_correct(Features(noise, labels)).double().mean()) < 0.5


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_scale_and_dead_columns_change_nothing(scale: float) -> None:
    """Features are scaled first; a constant column weighs nothing."""
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(30) % 3
    features = torch.randn(30, 8, generator=generator) + labels[:, None]
    dead = torch.cat([features * scale, torch.full((30, 1), 7.0)], dim=1)
    expected = ridge_correct(Features(features, labels)).tolist()
    assert ridge_correct(Features(dead, labels)).tolist() == expected
