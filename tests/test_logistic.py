"""Logistic regression: scikit-learn's, its C chosen on a part of train."""

from __future__ import annotations

import json

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from dino_lite.contracts import UserError
from dino_lite.eval.logistic import Logistic
from pooled import shades, small_vit, store_of


def test_shades_are_told_apart() -> None:
    """The result is plain JSON with an interval; a tenth of train chose C, all of it was fitted."""
    found = Logistic()(small_vit(), store_of(shades(60), shades(12, seed=1)))
    assert json.loads(json.dumps(found)) == found
    assert found["value"] == found["mean_per_class"] == 100.0
    assert found["interval"] == [100.0, 100.0]
    assert (found["num_train"], found["num_test"]) == (60, 12)
    assert "6 images held out of train, then fitted to all" in found["protocol"]
    assert len(found["held_out"]) == 12
    best = max(record["held out %"] for record in found["held_out"])
    assert best == next(
        r["held out %"] for r in found["held_out"] if r["C"] == found["settings"]["C"]
    )


def test_each_fit_of_the_path_is_scikit_learns_own() -> None:
    """Starting where the last one ended saves time and changes no result."""
    draw = np.random.default_rng(0)
    labels = np.arange(90) % 3
    features = draw.normal(size=(90, 4)) + labels[:, None]
    path = Logistic(tol=1e-10, max_iter=5000).path(features, labels, [0.01, 1.0, 10.0])
    for c, fit in path:
        alone = LogisticRegression(C=c, tol=1e-10, max_iter=5000).fit(features, labels)
        np.testing.assert_allclose(fit.coef_, alone.coef_, rtol=1e-4, atol=1e-6)


def test_a_fit_that_is_cut_short_is_told_without_a_warning() -> None:
    """Warnings are errors in tests: none leaks."""
    store = store_of(shades(30), shades(12, seed=1))
    assert Logistic()(small_vit(), store)["converged"] is True
    assert Logistic(max_iter=1)(small_vit(), store)["converged"] is False


def test_without_a_test_split_a_fifth_of_train_is_the_test() -> None:
    """Which then takes no part in choosing or fitting."""
    found = Logistic()(small_vit(), store_of(shades(60)))
    assert (found["num_train"], found["num_test"]) == (48, 12)


def test_nothing_to_choose_by_is_told_by_name() -> None:
    """Classes of one image each."""
    train = shades(3, labels=[0, 1, 2])
    with pytest.raises(UserError, match="Logistic regression needs a class with two"):
        Logistic()(small_vit(), store_of(train, shades(6, seed=1)))


@pytest.mark.parametrize(
    "wrong", [{"powers": [1]}, {"powers": [5, -6]}, {"num_cs": 0}, {"tol": 0.0}, {"max_iter": 0}]
)
def test_impossible_settings_are_refused(wrong: dict) -> None:
    """The key is named."""
    with pytest.raises(UserError, match=r"Logistic\.") as caught:
        Logistic(**wrong)
    assert next(iter(wrong)) in str(caught.value)
