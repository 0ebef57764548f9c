"""The verdict: which difference counts, and what a run says at its end."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dino_lite.config import get, load
from dino_lite.contracts import Splits
from dino_lite.data.sources import ArraySource
from dino_lite.eval.collapse import health, look
from dino_lite.eval.curves import num_prototypes, read_curves
from dino_lite.eval.verdict import (
    exceeds,
    expectation,
    health_line,
    judge,
    loss_line,
    verdict,
)
from dino_lite.runs.finish import labels_line
from test_health import K, N, match

OLD = Path(__file__).parent / "old" / "runs"


def entry(value: float, low: float, high: float) -> dict[str, Any]:
    return {"value": value, "interval": [low, high]}


@pytest.mark.parametrize(
    ("ours", "other", "expected"),
    [
        (entry(61.5, 58.4, 64.4), entry(28.0, 25.4, 30.7), True),
        (entry(30.0, 27.0, 33.0), entry(28.0, 25.4, 30.7), None),
        (entry(28.0, 25.0, 31.0), entry(28.0, 25.0, 31.0), False),
        (entry(20.0, 17.0, 23.0), entry(28.0, 25.0, 31.0), False),
        (entry(34.9, 31.0, 38.0), entry(30.0, 27.0, 33.0), None),  # 4.9 of sqrt(3.9² + 3²) = 4.92
        (entry(35.0, 31.1, 38.0), entry(30.0, 27.0, 33.0), True),  # 5.0
        ({"value": 90.0}, entry(10.0, 9.0, 11.0), None),
        (entry(90.0, 89.0, 91.0), {"value": 10.0, "interval": None}, None),
        ({"value": 10.0}, {"value": 10.0}, False),
        (entry(math.nan, math.nan, math.nan), entry(10.0, 9.0, 11.0), False),
    ],
)
def test_a_difference_counts_beyond_its_interval(
    ours: dict[str, Any], other: dict[str, Any], expected: bool | None
) -> None:
    """The interval of the difference, from both intervals; unknown ones show nothing."""
    assert exceeds(ours, other) is expected


def judged(trained: Any, untrained: Any, pixels: Any, num: int | None = 1000) -> Any:
    def as_entry(value: Any) -> dict[str, Any]:
        return {"value": value} if isinstance(value, float) else entry(*value)

    others = {"raw pixels": as_entry(pixels), "untrained": as_entry(untrained)}
    found = {"metric": "k-NN top-1", "unit": "%", "num_test": num, **as_entry(trained)}
    return judge(found | {"baselines": others})


@pytest.mark.parametrize(
    ("values", "learned", "text"),
    [
        (
            ((61.5, 58.4, 64.4), (28.0, 25.4, 30.7), (24.6, 22, 27.4)),
            True,
            "learned: 61.5 % against 28.0 % untrained and 24.6 % raw pixels (k-NN top-1, 95 % "
            "interval 58.4 to 64.4)",
        ),
        (
            ((17.6, 15, 20), (17.9, 15, 20), (44.2, 41, 47)),
            False,
            "nothing was learned yet: 17.6 % against 17.9 % untrained and 44.2 % raw pixels",
        ),
        (
            ((30.0, 27, 33), (28.0, 25, 31), (27.0, 24, 30)),
            False,
            "nothing was learned yet that 1,000 images can show (within the uncertainty): 30.0 %",
        ),
        (
            ((30.0, 27, 33), (28.0, 25, 31), (44.2, 41, 47)),
            False,
            "nothing was learned yet: 30.0 %",
        ),
        (
            ((40.0, 37, 43), (28.0, 25, 31), (44.2, 41, 47)),
            False,
            "learned, but raw pixels are as good or better: 40.0 % against 28.0 % untrained",
        ),
        (
            ((40.0, 37, 43), (28.0, 25, 31), (39.0, 36, 42)),
            False,
            "learned, but maybe no more than raw pixels (within the uncertainty): 40.0 %",
        ),
        (
            (61.5, 28.0, 24.6),
            False,
            "not known whether anything was learned (without confidence intervals): 61.5 %",
        ),
        ((17.6, 17.9, 44.2), False, "nothing was learned yet: 17.6 % against 17.9 % untrained"),
    ],
)
def test_a_judgment_names_each_baseline(values: Any, learned: bool, text: str) -> None:
    """Better than both, than one, than none, not known: a head of its own for each."""
    judgment = judged(*values)
    assert judgment.learned is learned
    assert judgment.text.startswith(text)


def test_what_has_no_baseline_in_percent_is_not_judged() -> None:
    """A count, and an accuracy alone."""
    found = {"metric": "x", "unit": "%", **entry(50, 49, 51)}
    assert judge(found) is None
    assert judge(found | {"baselines": {}}) is None
    assert judge(found | {"unit": "pairs", "baselines": {"untrained": entry(1, 0, 2)}}) is None


CURVES = {
    name: np.array([[0, first], [9, last]])
    for name, first, last in [
        ("loss", 5.5, 6.1),
        ("knn", 20.0, 33.0),
        ("rankme", 2.0, 45.1),
        ("prototype_perplexity", 9.0, 350.0),
        ("kl_to_uniform", 3.0, math.log(4096 / 350)),
        ("teacher_entropy", 2.0, 5.0),
    ]
} | {"embedding_std": np.stack([np.arange(10, 110, 5), np.full(20, 0.6)], axis=1)}
NUMBERS = {
    **{"knn_trained": 61.5, "knn_trained_interval": [58.4, 64.4]},
    **{"knn_untrained": 28.0, "knn_untrained_interval": [25.4, 30.7]},
    **{"knn_raw_pixels": 24.6, "knn_raw_pixels_interval": [22.0, 27.4], "knn_num_test": 1000},
}
HEALTH = (
    "Health: no sign of collapse, effective number of prototypes 350 of 4,096, effective rank of "
    "the features 45.1."
)


def test_a_run_that_learned_says_so_with_the_origin_of_its_labels() -> None:
    """And nothing else; weights that it began with are named."""
    results = NUMBERS | {"labels": "4 classes: the folders a, b, c, d"}
    said = verdict(results, CURVES)
    assert said[0].startswith("learned: 61.5 % against 28.0 % untrained and 24.6 % raw pixels")
    assert said[1:] == ["4 classes: the folders a, b, c, d.", HEALTH]
    (first, *_) = verdict(results | {"started_from": "W.pt"}, CURVES)
    assert "It began with the weights of W.pt" in first


def test_a_run_that_learned_nothing_says_what_to_do() -> None:
    """Longer, and with few images from pretrained weights; a collapse comes first."""
    results = NUMBERS | {"knn_trained": 20.0, "epochs": 12.0, "num_images": 300}
    first, second, last = verdict(results, CURVES)
    assert first.startswith("nothing was learned yet: 20.0 %")
    assert "saw each image 12 times" in second
    assert "backbone.pretrained=FILE (a dino_lite export, or published weights: of a Res" in second
    assert last == HEALTH
    assert "pretrained" not in verdict(results | {"num_images": 10**5}, CURVES)[1]
    alarm = {"kind": "x", "step": 1200, "text": "collapse: all is one; lower optim.rate."}
    _, second, third, last = verdict(results | {"warnings": [alarm]}, CURVES)
    assert second == "Next: do what the warning below says."
    assert third.startswith("Health: effective number of prototypes 350 of 4,096")
    assert last == "At step 1,200, collapse: all is one; lower optim.rate."


def test_a_run_that_measured_nothing_says_why() -> None:
    """No labels; baselines that were not asked for; a network that has diverged."""
    bare = {name: points for name, points in CURVES.items() if name != "knn"}
    unlabeled = {"labels": "no labels: class c has one image", "num_classes": 0}
    first, second, last = verdict(unlabeled, bare)
    assert "neighbors.png" in first
    assert "data.labels=FILE.csv" in first
    assert (second, last) == ("no labels: class c has one image.", HEALTH)
    assert "33.0 % on train at the end, was not compared" in verdict({}, CURVES)[0]
    assert verdict({}, bare)[0].startswith("k-NN was not compared")  # of an earlier version
    assert verdict({"knn_failed": "it diverged."}, {}) == ["k-NN was not measured: it diverged."]
    half = {"knn_trained": 61.5, "knn_trained_interval": [58.4, 64.4]}
    assert "was not compared" in verdict(half, CURVES)[0]
    asked = verdict({"baselines": False}, bare, "runs/my run")[0]
    assert asked == (
        "k-NN was not compared with baselines, as baselines=false asks: dino-lite evaluate "
        "'checkpoint=runs/my run' baselines=true does that."
    )


def test_skipped_steps_are_counted_and_are_no_collapse() -> None:
    """Their final number, not that of the warning; they change neither health nor advice."""
    early = {"kind": "skipped", "step": 50, "text": "1 of 50 steps so far was skipped."}
    results = NUMBERS | {"knn_trained": 20.0, "warnings": [early], "steps": 109}
    curves = CURVES | {"skipped_total": np.array([[49, 1], [108, 3]])}
    _, second, third, last = verdict(results, curves)
    assert second.startswith("Next: train longer")
    assert third == HEALTH
    assert last.startswith("3 of 109 steps had a gradient that is not finite and were skipped")
    assert verdict(results | {"skipped_total": 5}, curves)[3].startswith("5 of 109 steps")
    assert len(verdict(results, CURVES | {"skipped_total": np.array([[108, 0]])})) == 3


@pytest.mark.parametrize(
    ("steps", "total"),
    [([0, 1, 2], 3), (range(8), 8), (range(0, 12, 2), 12), (range(100, 110), 1000), ([], None)],
    ids=["three", "eight", "too few", "too short a time", "none"],
)
def test_no_collapse_is_not_said_of_a_run_that_could_not_show_one(steps: Any, total: Any) -> None:
    """A warning needs a tenth of the run and a full window after it."""
    points = np.array([[step, 0.6] for step in steps]).reshape(-1, 2)
    curves = CURVES | {"embedding_std": points}
    assert "collapse" not in health_line({"steps": total}, curves)
    assert "no sign of collapse" in health_line({"steps": 110}, CURVES)


def test_the_loss_is_explained_by_what_it_contains() -> None:
    """The targets' entropy where there are prototypes; nothing without a loss."""
    assert loss_line(CURVES).startswith("Loss: 5.500 at first, 6.100 at the end. It includes the")
    assert "a teacher that changes too" in loss_line({"loss": CURVES["loss"]})
    assert loss_line({}) == ""
    assert "quality" not in loss_line(CURVES)  # said before training
    assert expectation(True).endswith("k-NN does")
    assert expectation(False).endswith("neighbors.png shows it")


def test_the_number_of_prototypes_follows_from_what_is_logged() -> None:
    """Of the health of random outputs, and in the metrics of an old run."""
    values = health([look(*match(), N)])
    curves = {name: np.array([[0, value]]) for name, value in values.items()}
    assert num_prototypes(curves) == K
    assert num_prototypes({"prototype_perplexity": CURVES["loss"]}) is None
    old = read_curves(OLD / "dino_vit" / "metrics.csv")
    config = load(OLD / "dino_vit" / "config.yaml")
    assert num_prototypes(old) == get(config, "method.head.num_prototypes")


def splits(labels: list[int] | None, why: str = "", num_classes: int = 7) -> Splits:
    numbers = None if labels is None else np.array(labels)
    names = [f"c{i}" for i in range(num_classes)]
    images = torch.zeros(3, 2, 2, 3, dtype=torch.uint8)
    return Splits(ArraySource(images, numbers, names, "x"), None, "x", (), why)


@pytest.mark.parametrize(
    ("data", "how", "text"),
    [
        (
            splits([0, 1, 2], "the folders 2019, DCIM", 2),
            "auto",
            "2 classes: the folders 2019, DCIM; data.labels=none if they mean nothing",
        ),
        (splits([0, 1, 2], "the file L.csv"), "L.csv", "7 classes: the file L.csv"),
        (splits([0, 1, 2]), None, "7 classes: c0, c1, c2, c3, c4 and 2 more"),
        (splits(None, "class c has one image"), "auto", "no labels: class c has one image"),
        (splits(None, "data.labels=none"), "none", "no labels: data.labels=none"),
        (splits([-1, -1, -1]), "auto", "no labels: the data has none"),
    ],
)
def test_labels_are_explained(data: Splits, how: str | None, text: str) -> None:
    """By the source's own words, else by names or by the reason that its paths show."""
    assert labels_line(data, how) == text
