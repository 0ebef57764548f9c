"""Golden cases of evaluations: every number from the case, every answer from public code."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from dino_lite.eval.features import Features
from dino_lite.eval.knn import knn_accuracy, knn_votes, nearest, unit
from golden.check import Check

_VOTE_TOLERANCE = 1e-4  # of the largest vote: exp(s/T) makes 1e-6 and more of float32's 1e-7


def a09(case: dict[str, Any], tensors: dict[str, Tensor], folder: Path) -> Iterator[Check]:
    """Weighted k-NN: accuracies at every k and temperature; classes and votes where given."""
    bank = Features(tensors["in.train_features"], tensors["in.train_labels"])
    queries = Features(tensors["in.test_features"], tensors["in.test_labels"])
    one_image = 100.0 / len(queries.labels)
    for setting, expected in case["data"]["results_percent"].items():
        k, temperature = _setting(setting)
        found = knn_accuracy(queries, bank, [k], temperature)[k]
        tolerance = max(0.2, one_image) + 1e-3
        yield Check(f"{setting}.top1", abs(found.top1 - expected["top1"]), tolerance)
        yield Check(f"{setting}.top5", abs(found.top5 - expected["top5"]), tolerance)
    for name, wanted in tensors.items():
        kind, _, setting = name.partition(".")[2].partition(".")
        if not name.startswith("out."):
            continue
        k, temperature = _setting(setting)
        similarity, index = nearest(unit(queries.features), unit(bank.features), k)
        votes = knn_votes(similarity, bank.labels[index], temperature, case["hyper"]["num_classes"])
        if kind.startswith("class_scores"):
            error = (votes[: len(wanted)] - wanted).abs().max() / wanted.abs().max()
            yield Check(f"{setting}.votes", float(error), _VOTE_TOLERANCE)
        elif kind == "top1_class":
            changed = (votes.argmax(dim=1) != wanted).double().mean()
            yield Check(f"{setting}.class", 100.0 * float(changed), max(0.2, one_image))


def _setting(name: str) -> tuple[int, float]:
    """k and temperature out of "k20_T0.07"."""
    k, temperature = name.removeprefix("k").split("_T")
    return int(k), float(temperature)
