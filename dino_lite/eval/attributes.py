"""Linear models on frozen features for the columns of a table: several labels, or numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from dino_lite.contracts import Backbone, Evaluation, UserError
from dino_lite.data.subset import hold_out
from dino_lite.data.targets import Targets, read_targets
from dino_lite.eval.features import Pooled, check_finite
from dino_lite.eval.holdout import CHOICE_SHARE, TEST_SHARE
from dino_lite.eval.logistic import Logistic, Powers, double, powers_of_ten
from dino_lite.eval.metrics import explained, mean_average_precision
from dino_lite.eval.results import resampled, result
from dino_lite.eval.store import FeatureStore
from dino_lite.meter import metered
from dino_lite.settings.kinds import Count, Size
from dino_lite.settings.validate import checked


class Parts(NamedTuple):
    """Features of the images with a row in the table, and their rows."""

    train: Float64[np.ndarray, "N D"]
    known: Float[Tensor, "N L"]
    test: Float64[np.ndarray, "n D"]
    wanted: Float[Tensor, "n L"]
    titles: list[str]
    images: str
    num_without: int


class MultiLabel(Evaluation):
    """Evaluation by mean average precision: a logistic regression for each 0/1 column of the table
    `targets`, with one common C, chosen on a part of train.
    """

    @checked
    def __init__(
        self,
        targets: str | None = None,
        powers: Powers = (-6, 5),
        num_cs: Size = 12,
        seed: Count = 0,
    ) -> None:
        self.targets, self.seed = targets, seed
        self.regression = Logistic(powers, num_cs)

    def __call__(self, backbone: Backbone, store: FeatureStore) -> dict[str, Any]:
        """mAP on test; the average precision of each label in the table."""
        parts = divide("multilabel", self.targets, backbone, store)
        for table in (parts.known, parts.wanted):
            if not bool(((table == 0) | (table == 1)).all()):
                raise UserError(
                    f"eval.multilabel.targets={self.targets} holds other numbers than 0 and 1; "
                    "for numbers choose eval=regression."
                )
        known, wanted = parts.known.bool(), parts.wanted.bool()
        kept, held = hold_out(torch.zeros(len(known)).long(), CHOICE_SHARE, self.seed)
        judged = self._judge(parts.train, known, kept, held)
        chosen = max(judged, key=lambda c: judged[c])
        scores = torch.stack(
            [
                self._scores(parts.train, column, [chosen], parts.test)[0]
                for column in known.unbind(1)
            ],
            dim=1,
        )
        value, each = mean_average_precision(scores, wanted)
        if math.isnan(value):
            raise UserError(
                f"eval.multilabel.targets={self.targets} has no 1 for any image to test on: "
                "there is nothing to find."
            )
        return result(
            "multi-label mAP",
            value,
            protocol=(
                "logistic regression for each label on CLS features, mean average precision, C of "
                f"{len(judged)} chosen on {len(held):,} images held out of train; {parts.images}"
            ),
            settings={"C": chosen, "labels": len(each)},
            num_train=len(known),
            num_test=len(wanted),
            without_row=parts.num_without,
            table=[
                {
                    "label": title,
                    "in train": int(known[:, i].sum()),
                    "in test": int(wanted[:, i].sum()),
                    "AP %": None if math.isnan(each[i]) else each[i],
                }
                for i, title in enumerate(parts.titles)
            ],
        )

    def _judge(
        self,
        features: Float64[np.ndarray, "N D"],
        known: Bool[Tensor, "N L"],
        kept: Tensor,
        held: Tensor,
    ) -> dict[float, float]:
        """mAP on the held-out part by C; 0 if no label occurs in it."""
        cs = self.regression.cs
        each = [
            self._scores(features[kept.numpy()], column[kept], cs, features[held.numpy()])
            for column in metered(known.unbind(1), known.shape[1], "values of C", "labels")
        ]
        scores = torch.stack([torch.stack(by_c) for by_c in each], dim=-1)  # C H L
        found = [mean_average_precision(of_c, known[held])[0] for of_c in scores]
        return {c: 0.0 if math.isnan(value) else value for c, value in zip(cs, found, strict=True)}

    def _scores(
        self,
        features: Float64[np.ndarray, "N D"],
        column: Bool[Tensor, "N"],
        cs: Sequence[float],
        asked: Float64[np.ndarray, "n D"],
    ) -> list[Float[Tensor, "n"]]:
        """Log-odds of one label at each C; constant if all images of train agree."""
        if column.all() or not column.any():
            return [torch.zeros(len(asked), dtype=torch.float64) for _ in cs]
        path = self.regression.path(features, column.long().numpy(), cs)
        return [torch.from_numpy(fit.decision_function(asked)) for _, fit in path]


class Regression(Evaluation):
    """Evaluation by R² on test: ridge regression on each column of the table `targets`, each with a
    penalty chosen on train by leave-one-out.
    """

    @checked
    def __init__(
        self,
        targets: str | None = None,
        powers: Powers = (-3, 6),
        num_alphas: Size = 19,
    ) -> None:
        self.targets = targets
        self.alphas = powers_of_ten(powers, num_alphas)

    def __call__(self, backbone: Backbone, store: FeatureStore) -> dict[str, Any]:
        """R², averaged over the columns; R² and mean absolute error of each in the table.

        The interval is a bootstrap over test images, of errors and variance together; a column that
        is constant in a sample keeps its R² of all images there.
        """
        from sklearn.linear_model import RidgeCV

        parts = divide("regression", self.targets, backbone, store)
        fit = RidgeCV(self.alphas, alpha_per_target=True).fit(parts.train, parts.known.numpy())
        found = fit.predict(parts.test).reshape(len(parts.test), -1)
        predicted = torch.from_numpy(found)
        num = len(parts.test)
        whole = explained(predicted, parts.wanted, torch.ones(1, num, dtype=torch.float64))[0]
        same = [t for t, value in zip(parts.titles, whole.tolist(), strict=True) if value != value]
        if same:
            raise UserError(
                f"eval.regression.targets={self.targets}: column {same[0]} is the same for all "
                "images to test on, so nothing of it can be explained; leave it out."
            )

        def mean(times: Float[Tensor, "m n"]) -> Float[Tensor, "m"]:
            found = explained(predicted, parts.wanted, times)
            return torch.where(found.isnan(), whole, found).mean(dim=1)

        errors = (predicted - parts.wanted).abs().mean(dim=0)
        alphas = np.atleast_1d(fit.alpha_).tolist()
        return result(
            "regression R²",
            float(whole.mean()),
            unit="",
            protocol=(
                f"ridge regression on CLS features, the penalty of {len(self.alphas)} chosen by "
                f"leave-one-out on train; {parts.images}"
            ),
            settings={"columns": len(parts.titles)},
            num_train=len(parts.train),
            num_test=num,
            interval=list(resampled(mean, num)),
            without_row=parts.num_without,
            table=[
                {
                    "column": title,
                    "R²": float(whole[i]),
                    "mean absolute error": float(errors[i]),
                    "penalty": alphas[i],
                }
                for i, title in enumerate(parts.titles)
            ],
        )


def divide(name: str, table: str | None, backbone: Backbone, store: FeatureStore) -> Parts:
    """Features and targets of the images in the table: of train and test, or with a fifth of train
    held out if no image of test is in the table.
    """
    if table is None:
        raise UserError(
            f"eval.{name}.targets is not set: name a CSV file with a column path and columns of "
            "numbers."
        )
    splits = store.data.splits
    sources = [splits.train] if splits.test is None else [splits.train, splits.test]
    targets = read_targets(table, f"eval.{name}.targets", sources)
    found = [
        _of_table(store.pooled(backbone, source), rows, targets)
        for source, rows in zip(sources, targets.rows, strict=True)
    ]
    num_without = sum(num for _, _, num in found)
    (train, known, _), where = found[0], "of test"
    if len(found) > 1 and len(found[1][1]):
        test, wanted, _ = found[1]
    else:
        kept, held = hold_out(torch.zeros(len(known)).long(), TEST_SHARE, seed=0)
        test, wanted = train.rows(held), known[held]
        train, known, where = train.rows(kept), known[kept], "held out of train"
    if len(known) < 2 or not len(wanted):
        raise UserError(
            f"eval.{name}.targets={table} names {len(known) + len(wanted)} readable images: too "
            "few to learn from and to test on."
        )
    check_finite(f"eval={name}", train.cls, train.patches, test.cls, test.patches)
    features = (double(part.features().features) for part in (train, test))
    images = f"{len(known):,} images of train, tested on {len(wanted):,} {where}"
    if num_without:
        images += f", {num_without:,} images without a row left out"
    a, b = features
    return Parts(a, known, b, wanted, targets.titles, images, num_without)


def _of_table(
    pooled: Pooled, rows: np.ndarray, targets: Targets
) -> tuple[Pooled, Float[Tensor, "N L"], int]:
    """The images that have a row, their rows, and the number without one."""
    row = torch.from_numpy(rows)[pooled.index]
    has = row >= 0
    return pooled.rows(has), torch.from_numpy(targets.values)[row[has]], int((~has).sum())
