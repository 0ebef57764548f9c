"""Metrics against their definitions, and against scikit-learn."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import (
    average_precision_score,
    balanced_accuracy_score,
    r2_score,
)

from dino_lite.eval.metrics import (
    average_precision,
    explained,
    last_equal,
    mean_average_precision,
    mean_per_class,
)


@given(st.integers(1, 40), st.integers(0, 100))
def test_mean_per_class_is_the_balanced_accuracy(num: int, seed: int) -> None:
    """Each class that is there counts alike."""
    draw = np.random.default_rng(seed)
    labels, predicted = draw.integers(0, 4, num), draw.integers(0, 4, num)
    found = mean_per_class(torch.from_numpy(labels == predicted), torch.from_numpy(labels))
    by_class = [(predicted[labels == c] == c).mean() for c in set(labels.tolist())]
    assert found == pytest.approx(100 * float(np.mean(by_class)))
    if set(predicted.tolist()) <= set(labels.tolist()) and len(by_class) > 1:
        assert found == pytest.approx(100 * balanced_accuracy_score(labels, predicted))


@given(st.integers(1, 40), st.booleans(), st.integers(0, 200))
def test_average_precision_is_scikit_learns(num: int, tied: bool, seed: int) -> None:
    """Equal scores come in together."""
    draw = np.random.default_rng(seed)
    truth = draw.random(num) < 0.4
    truth[int(draw.integers(num))] = True
    scores = draw.integers(0, 4, num) / 4 if tied else draw.random(num)
    found = average_precision(torch.from_numpy(scores), torch.from_numpy(truth))
    assert found == pytest.approx(average_precision_score(truth, scores))


def test_labels_that_no_image_has_are_left_out_of_the_mean() -> None:
    """Their own number is no number."""
    scores = torch.tensor([[0.9, 0.1, 0.5], [0.2, 0.8, 0.4]])
    truth = torch.tensor([[True, False, False], [False, False, True]])
    value, each = mean_average_precision(scores, truth)
    assert value == 75.0
    assert each[0] == 100.0
    assert math.isnan(each[1])
    assert each[2] == 50.0
    assert math.isnan(mean_average_precision(scores, truth & False)[0])


@given(st.integers(2, 30), st.integers(0, 100))
def test_what_is_explained_is_r2_of_each_sample(num: int, seed: int) -> None:
    """As scikit-learn has it, worse than nothing included."""
    draw = np.random.default_rng(seed)
    wanted, predicted = draw.normal(size=num), draw.normal(size=num)
    times = np.stack([np.ones(num), draw.multinomial(num, np.full(num, 1 / num))])
    columns = (torch.from_numpy(each)[:, None] for each in (predicted, wanted))
    found = explained(*columns, torch.from_numpy(times).double())[:, 0]
    assert float(found[0]) == pytest.approx(r2_score(wanted, predicted))
    rows = np.repeat(np.arange(num), times[1].astype(int))
    if len(set(rows)) > 1:
        assert float(found[1]) == pytest.approx(r2_score(wanted[rows], predicted[rows]))
    else:
        assert math.isnan(found[1])
    same = torch.full((2, 1), 0.1)
    assert explained(torch.ones(2, 1), same, torch.ones(1, 2).double()).isnan().all()


def test_the_last_of_equals_is_found_row_by_row() -> None:
    """None equal, all equal, some."""
    rows = torch.tensor([[3.0, 2.0, 1.0, 0.0], [1.0, 1.0, 1.0, 1.0], [2.0, 2.0, 1.0, 1.0]])
    assert last_equal(rows).tolist() == [[0, 1, 2, 3], [3, 3, 3, 3], [1, 1, 3, 3]]
