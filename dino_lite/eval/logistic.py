"""Logistic regression on frozen features, fitted to convergence.

Oquab et al. 2023, section 7.1; L2, its weight chosen on a part of train.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Annotated, Any

import numpy as np
import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from dino_lite.contracts import Backbone, Evaluation
from dino_lite.eval.holdout import chooser, classification
from dino_lite.eval.metrics import mean_per_class
from dino_lite.eval.probes import Head
from dino_lite.eval.results import percent, result
from dino_lite.eval.short_grid import in_span
from dino_lite.eval.store import FeatureStore
from dino_lite.meter import metered
from dino_lite.settings.kinds import Count, Positive, Size, rising
from dino_lite.settings.validate import checked

# Of ten: an exponent, and another that is no smaller.
Powers = Annotated[Sequence[float], rising()]


class Logistic(Evaluation):
    """Evaluation by logistic regression on class tokens of the last block, with C one of `num_cs`
    values from 10^`powers[0]` to 10^`powers[1]`, evenly spaced in the exponent.
    """

    @checked
    def __init__(
        self,
        powers: Powers = (-6, 5),
        num_cs: Size = 12,
        tol: Positive = 1e-5,
        max_iter: Size = 300,
        seed: Count = 0,
    ) -> None:
        self.cs = powers_of_ten(powers, num_cs)
        self.tol, self.max_iter, self.seed = tol, max_iter, seed

    def __call__(self, backbone: Backbone, store: FeatureStore) -> dict[str, Any]:
        """Accuracy on test of the fit to all of train, with the C chosen on a tenth of it."""
        task = classification(backbone, store, "Logistic regression")
        train, test = in_span(Head(1, False, 1.0, 1.0), task.train, task.test)  # the same optimum
        features, labels = double(train.features().features), task.train.labels.numpy()
        kept, held = (
            rows.numpy() for rows in chooser("Logistic regression", task.train.labels, self.seed)
        )
        judged: dict[float, float] = {}
        fits = self.path(features[kept], labels[kept], self.cs)
        for c, fit in metered(fits, len(self.cs), "values of C", "fits"):
            judged[c] = 100 * float((fit.predict(features[held]) == labels[held]).mean())
        chosen = max(
            judged, key=lambda c: judged[c]
        )  # ties go to the smallest C, the simplest model
        ((_, fit),) = self.path(features, labels, [chosen])
        predicted = torch.from_numpy(fit.predict(double(test.features().features)))
        correct = predicted == task.test.labels
        return result(
            "logistic top-1",
            float(percent(correct).mean()),
            protocol=(
                f"logistic regression (lbfgs, L2) on CLS features, C of {len(self.cs)} from "
                f"{self.cs[0]:g} to {self.cs[-1]:g} chosen on {len(held):,} images held out of "
                f"train, then fitted to all; {task.images}"
            ),
            settings={"C": chosen},
            num_train=len(labels),
            num_test=len(correct),
            scores=percent(correct),
            mean_per_class=mean_per_class(correct, task.test.labels),
            held_out=[{"C": c, "held out %": value} for c, value in judged.items()],
            converged=int(fit.n_iter_.max()) < self.max_iter,
        )

    def path(
        self,
        features: Float64[np.ndarray, "N D"],
        labels: Int64[np.ndarray, "N"],
        cs: Sequence[float],
    ) -> Iterator[tuple[float, Any]]:
        """scikit-learn's fit at each C, each warm-started from the previous one and valid only
        until the next.
        """
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.linear_model import LogisticRegression

        fit = LogisticRegression(tol=self.tol, max_iter=self.max_iter, warm_start=True)
        for c in cs:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ConvergenceWarning)  # reported as `converged`
                fit.set_params(C=c).fit(features, labels)
            yield c, fit


def powers_of_ten(powers: Powers, num: int) -> list[float]:
    """`num` values from 10^powers[0] to 10^powers[1], evenly spaced in the exponent."""
    return [float(value) for value in np.logspace(powers[0], powers[1], num)]


def double(features: Tensor) -> Float64[np.ndarray, "N D"]:
    """Features as float64 arrays for scikit-learn."""
    array: np.ndarray = features.double().numpy()
    return array
