"""Golden cases of evaluations: every number from the case, every answer from public code."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from dino_lite.eval.features import Features
from dino_lite.eval.fewshot import draw_few
from dino_lite.eval.knn import Answers, knn_accuracy, knn_answers, knn_probs, knn_votes
from dino_lite.eval.metrics import mean_per_class
from dino_lite.eval.neighbors import nearest
from golden.check import Check, bound, compare

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
        similarity, index = nearest(queries.features, bank.features, k)
        votes = knn_votes(similarity, bank.labels[index], temperature, case["hyper"]["num_classes"])
        if kind.startswith("class_scores"):
            error = (votes[: len(wanted)] - wanted).abs().max() / wanted.abs().max()
            yield Check(f"{setting}.votes", float(error), _VOTE_TOLERANCE)
        elif kind == "top1_class":
            changed = (votes.argmax(dim=1) != wanted).double().mean()
            yield Check(f"{setting}.class", 100.0 * float(changed), max(0.2, one_image))


def d25(case: dict[str, Any], tensors: dict[str, Tensor], folder: Path) -> Iterator[Check]:
    """DINOv2's k-NN: probabilities at each k from one search, accuracies of images and of classes,
    few-shot draws.
    """
    bank = Features(tensors["in.train_features"], tensors["in.train_labels"])
    queries = Features(tensors["in.test_features"], tensors["in.test_labels"])
    hyper, tolerance = case["hyper"], bound(case["tolerance"]["f32"])
    ks, temperature = hyper["ks"], hyper["temperature"]
    similarity, index = nearest(queries.features, bank.features, max(ks))
    found = knn_probs(similarity, bank.labels[index], ks, temperature, hyper["num_classes"])
    for k, probs in found:
        wanted = tensors[f"out.probas_first60.k{k}"]
        yield compare(f"k{k}.probas", probs[: len(wanted)], wanted, tolerance)
    answers = knn_answers(queries, bank, ks, temperature)
    for k in ks:
        expected = case["data"]["accuracy"]
        yield from _accuracy(f"k{k}_micro", answers[k], expected)
        for top in (1, 5):
            macro = mean_per_class(answers[k].correct(top), queries.labels) / 100
            error = abs(macro - expected[f"k{k}_macro"][f"top-{top}"])
            weight = 1 / (hyper["num_classes"] * int(queries.labels.bincount().min()))
            yield Check(f"k{k}_macro.top{top}", error, weight + 1e-6)
    for name, wanted in tensors.items():
        if name.startswith("fewshot/"):
            num, seed = map(int, re.findall(r"\d+", name))
            yield compare(name, draw_few(bank.labels, num, seed), wanted, bound("atol 0"))
    for name, expected in case["data"]["fewshot_accuracy"].items():
        num, seed, k = map(int, re.findall(r"\d+", name))
        few = bank.rows(draw_few(bank.labels, num, seed))
        answers = knn_answers(queries, few, [k], temperature)
        # Of classes without votes any may come among five: the reference leaves it to its sort.
        similarity, index = nearest(queries.features, few.features, k)
        votes = knn_votes(similarity, few.labels[index], temperature, hyper["num_classes"])
        own = votes.gather(1, queries.labels[:, None])[:, 0]
        open_ = ((votes > 0).sum(dim=1) < 5) & (own == 0)
        yield from _accuracy(name, answers[k], {name: expected}, float(open_.double().mean()))


def _accuracy(
    name: str, answers: Answers, expected: dict[str, Any], open_: float = 0.0
) -> Iterator[Check]:
    """Part of the images whose class is the first, or among five, within one image and what is
    left open.
    """
    one_image = 1 / len(answers.place) + 1e-6
    for top, tolerance in ((1, one_image), (5, one_image + open_)):
        share = float(answers.correct(top).double().mean())
        yield Check(f"{name}.top{top}", abs(share - expected[name][f"top-{top}"]), tolerance)


def _setting(name: str) -> tuple[int, float]:
    """k and temperature out of "k20_T0.07"."""
    k, temperature = name.removeprefix("k").split("_T")
    return int(k), float(temperature)
