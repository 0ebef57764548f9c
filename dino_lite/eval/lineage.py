"""Generations of a backbone: k-NN of each and of their ensemble, and agreement with the one before,
its teacher (Furlanello et al. 2018, arXiv 1805.04770, without labels).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from dino_lite.contracts import Backbone
from dino_lite.data.labeled import has_labels
from dino_lite.data.subset import Subset, spread
from dino_lite.eval.agreement import Standing, learned_mistakes
from dino_lite.eval.features import Features, check_finite
from dino_lite.eval.knn import Answers, knn_answers
from dino_lite.eval.neighbors import indices_of_nearest, unit
from dino_lite.eval.results import bootstrap, interval, percent, result
from dino_lite.eval.store import FeatureStore
from dino_lite.eval.tradeoff import agreement

K, TEMPERATURE = 20, 0.07  # as the headline of `eval.knn`
_MOST = 10_000  # training images that are classified, or whose neighbors are compared


class View(NamedTuple):
    """What a network makes of the images: predictions of k-NN where there are labels, else the
    indices of the nearest neighbors.
    """

    train: Answers | None
    test: Answers | None
    neighbors: Int[Tensor, "n k"] | None


def compare_generations(generations: Sequence[Backbone], store: FeatureStore) -> dict[str, Any]:
    """The result of the last of `generations`, with a table of all of them and their ensemble,
    k-NN on their unit features side by side.

    With labels: leave-one-out k-NN on train (on 10,000 images of it, if there are more) and k-NN of
    a labeled test split; agreement is the percent of test images, else of train, for which a
    generation and the one before predict the same class. Without: the percent of nearest
    neighbors that they have in common.
    """
    train, test = store.data.splits.train, store.data.splits.test
    labeled = has_labels(train)
    queries = test if labeled and test is not None and has_labels(test) else None
    tested = queries is not None
    few = train if len(train) <= _MOST or tested else Subset(train, spread(len(train), _MOST))
    banks = [store.pooled(each, few).features() for each in generations]
    asked = [] if queries is None else [store.pooled(x, queries).features() for x in generations]
    for part in (*banks, *asked):
        check_finite("k-NN", part.features)
    labeled = labeled and banks[0].labeled().num_classes > 1
    views = [_view(bank, asked[i] if asked else None, labeled) for i, bank in enumerate(banks)]
    whole = _view(_joined(banks), _joined(asked) if asked else None, labeled) if labeled else None
    agreed = [None, *(_agreement(*pair) for pair in pairwise(views))]
    rows = [_row(view) | {"agreement": each} for view, each in zip(views, agreed, strict=True)]
    ensemble = None if whole is None else _row(whole)
    return _result(rows, ensemble, views[-1], tested, len(banks[0].labels))


def _view(bank: Features, queries: Features | None, labeled: bool) -> View:
    few = bank.rows(torch.from_numpy(spread(len(bank.labels), _MOST)))
    if not labeled:
        k = min(K, len(few.labels) - 1)
        found = indices_of_nearest(few.features, few.features, k, leave_one_out=True)
        return View(None, None, found)
    bank, few = bank.labeled(), few.labeled()
    k = min(K, len(few.labels) - 1)
    train = knn_answers(few, few, [k], TEMPERATURE, leave_one_out=True)[k]
    if queries is None:
        return View(train, None, None)
    k = min(K, len(bank.labels))
    return View(train, knn_answers(queries.labeled(), bank, [k], TEMPERATURE)[k], None)


def _joined(parts: Sequence[Features]) -> Features:
    """Unit features of several networks side by side."""
    return parts[0]._replace(features=torch.cat([unit(part.features) for part in parts], dim=1))


def _agreement(before: View, now: View) -> float:
    """Percent of equal predictions, or of common neighbors."""
    if now.neighbors is not None:
        assert before.neighbors is not None
        return float(agreement(before.neighbors, now.neighbors).mean())
    ours, theirs = now.test or now.train, before.test or before.train
    assert ours is not None
    assert theirs is not None
    return float(percent(ours.predicted == theirs.predicted).mean())


def _row(view: View) -> dict[str, Any]:
    """Top-1 and its interval, in percent, on train and test."""
    found = {}
    for name, answers in (("train", view.train), ("test", view.test)):
        if answers is not None:
            scores = percent(answers.correct())
            found[name] = {"top1": float(scores.mean()), "interval": [*bootstrap(scores)]}
    return found


def _result(
    rows: list[dict[str, Any]],
    ensemble: dict[str, Any] | None,
    last: View,
    tested: bool,
    num_bank: int,
) -> dict[str, Any]:
    answers, split = last.test or last.train, "test" if tested else "train"
    several = f"generation {len(rows)}"
    names = [*(str(i) for i in range(1, len(rows) + 1)), "ensemble"]
    listed = [*rows, *([] if ensemble is None else [ensemble])]
    table = [_cells(name, row) for name, row in zip(names, listed, strict=False)]
    details: dict[str, Any] = {"generations": rows, "ensemble": ensemble, "table": table}
    if answers is None:
        assert last.neighbors is not None
        return result(
            "neighbors in common with the teacher",
            rows[-1]["agreement"] if rows[-1]["agreement"] is not None else 100.0,
            protocol=f"{several}; percent of the {last.neighbors.shape[1]} nearest neighbors that "
            "a generation has in common with the one before, CLS features",
            settings={"k": last.neighbors.shape[1]},
            num_train=num_bank,
            num_test=len(last.neighbors),
            **details,
        )
    num = len(answers.place)
    stages = [
        Standing(f"generation {i}", row[split]["top1"], row["agreement"], num)
        for i, row in enumerate(rows, 1)
    ]
    warnings = learned_mistakes(stages)
    where = "queries = test" if tested else "leave-one-out on train"
    return result(
        "k-NN top-1",
        rows[-1][split]["top1"],
        protocol=f"{several}; weighted k-NN, cosine, T={TEMPERATURE:g}, CLS features, {where}; "
        "ensemble: unit features of all generations side by side",
        settings={"k": K, "temperature": TEMPERATURE},
        num_train=num_bank,
        num_test=num,
        scores=percent(answers.correct()),
        **details | ({"warnings": warnings} if warnings else {}),
    )


def _cells(name: str, row: dict[str, Any]) -> dict[str, Any]:
    """A row of the table."""
    cells: dict[str, Any] = {"generation": name}
    for split in ("train", "test"):
        if split in row:
            cells[f"k-NN on {split} %"] = row[split]["top1"]
            told = interval({"unit": "%"} | row[split])
            cells[f"{split}: 95 % interval"] = told
    agreed = row.get("agreement")
    return cells | {"agreement with its teacher %": "" if agreed is None else agreed}
