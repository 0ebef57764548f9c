"""Weighted k-NN against plain loops, at every size that has broken somebody's."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dino_lite.backbones.vit import ViT
from dino_lite.contracts import Splits, UserError
from dino_lite.data.clean import CleanData
from dino_lite.data.preprocessing import Preprocessing
from dino_lite.data.sources import ArraySource
from dino_lite.eval import knn as module
from dino_lite.eval import neighbors
from dino_lite.eval.features import Features
from dino_lite.eval.knn import KNN, knn_accuracy, knn_predict, knn_probs, knn_votes
from dino_lite.eval.neighbors import unit
from dino_lite.eval.store import FeatureStore


def loops(
    queries: Features, bank: Features, k: int, temperature: float, leave_one_out: bool
) -> tuple[float, float]:
    """Top-1 and top-5 in percent, by the definition: sort, take k, add up votes, sort classes."""
    similarity = (unit(queries.features) @ unit(bank.features).T).tolist()
    classes = sorted({*bank.labels.tolist(), *queries.labels.tolist()})
    hits1 = hits5 = 0
    for i, row in enumerate(similarity):
        others = [j for j in range(len(row)) if not (leave_one_out and j == i)]
        chosen = sorted(others, key=lambda j: (-row[j], j))[:k]
        votes = dict.fromkeys(classes, 0.0)
        for j in chosen:
            votes[int(bank.labels[j])] += math.exp((row[j] - row[chosen[0]]) / temperature)
        order = sorted(classes, key=lambda c: (-votes[c], c))
        hits1 += int(queries.labels[i]) in order[:1]
        hits5 += int(queries.labels[i]) in order[: min(5, k)]
    return 100 * hits1 / len(similarity), 100 * hits5 / len(similarity)


def draw(num: int, dim: int, num_classes: int, seed: int, coarse: bool = False) -> Features:
    """Random features; coarse ones are often equally similar, and their cosines exact anywhere."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(num, dim, generator=generator)
    labels = torch.randint(num_classes, (num,), generator=generator)
    if coarse:
        features = features.sign()
        features[:, 4 if dim >= 4 else 1 :] = 0.0  # of length 2 or 1: exact
    return Features(features, labels)


@given(
    num_queries=st.integers(1, 12),
    num_bank=st.integers(2, 30),
    dim=st.integers(1, 5),
    num_classes=st.integers(1, 9),
    k=st.integers(1, 40),
    temperature=st.sampled_from([0.07, 0.2, 1.0]),
    leave_one_out=st.booleans(),
    coarse=st.booleans(),
    seed=st.integers(0, 100),
)
def test_accuracy_equals_plain_loops(
    num_queries: int,
    num_bank: int,
    dim: int,
    num_classes: int,
    k: int,
    temperature: float,
    leave_one_out: bool,
    coarse: bool,
    seed: int,
) -> None:
    """Few queries, few classes, tied similarities, one-dimensional features: as the definition."""
    bank = draw(num_bank, dim, num_classes, seed, coarse)
    queries = bank if leave_one_out else draw(num_queries, dim, num_classes + 1, seed + 1, coarse)
    k = min(k, num_bank - leave_one_out)
    found = knn_accuracy(queries, bank, [k], temperature, leave_one_out=leave_one_out)
    assert found[k] == pytest.approx(loops(queries, bank, k, temperature, leave_one_out))


@pytest.mark.parametrize(
    ("k", "top1", "top5"), [(1, 58.5, 58.5), (5, 59.0, 81.5), (20, 59.5, 87.0)]
)
def test_accuracy_equals_the_references(k: int, top1: float, top5: float) -> None:
    """Figures that the official script gave for the same features."""
    train = torch.sin(0.37 * torch.arange(300 * 8)).reshape(300, 8)
    test = torch.cos(0.53 * torch.arange(200 * 8)).reshape(200, 8)
    bank, queries = Features(train, train.argmax(1)), Features(test, test.argmax(1))
    assert knn_accuracy(queries, bank, [k], 0.07)[k] == pytest.approx((top1, top5))


@pytest.mark.parametrize("leave_one_out", [False, True])
def test_accuracy_does_not_depend_on_the_block(
    monkeypatch: pytest.MonkeyPatch, leave_one_out: bool
) -> None:
    """Queries one by one, or all at once, with more than a thousand classes of large numbers."""
    bank = draw(1200, 6, 1100, seed=0)
    bank = bank._replace(labels=bank.labels * 1_000_003)
    near = bank.features[:40] + 0.01
    queries = bank if leave_one_out else Features(near, bank.labels[:40])
    at_once = knn_accuracy(queries, bank, [7, 50], 0.07, leave_one_out=leave_one_out)
    monkeypatch.setattr(module, "_VOTES", 11_000)
    monkeypatch.setattr(module, "_QUERIES", 30)
    monkeypatch.setattr(neighbors, "_CELLS", 3000)
    in_blocks = knn_accuracy(queries, bank, [7, 50], 0.07, leave_one_out=leave_one_out)
    assert in_blocks == at_once
    assert at_once[7].top1 > 50 or leave_one_out


def test_a_query_is_not_its_own_neighbor() -> None:
    """Each image is alone with its class and beside another: only cheating could get it right."""
    features = torch.eye(4).repeat_interleave(2, dim=0)
    bank = Features(features, torch.arange(8))
    assert knn_accuracy(bank, bank, [1], 0.07)[1].top1 > 0
    assert knn_accuracy(bank, bank, [1], 0.07, leave_one_out=True)[1].top1 == 0


def test_votes_are_sums_of_exponentials() -> None:
    """The paper's exp(similarity / T), added up by class."""
    votes = knn_votes(torch.tensor([[0.9, 0.5, 0.4]]), torch.tensor([[2, 0, 2]]), 0.5, 3)
    expected = [math.exp(1.0), 0.0, math.exp(1.8) + math.exp(0.8)]
    assert votes[0].tolist() == pytest.approx(expected, rel=1e-6)


def test_a_tiny_temperature_is_the_nearest_neighbor() -> None:
    """exp does not overflow: at T = 1e-5 the nearest image decides alone."""
    bank, queries = draw(60, 4, 5, seed=0), draw(30, 4, 5, seed=1)
    cold = knn_accuracy(queries, bank, [20], 1e-5)[20].top1
    assert cold == knn_accuracy(queries, bank, [1], 0.07)[1].top1


def test_features_of_zeros_are_classified_too() -> None:
    """A dead feature has similarity 0 to all, not NaN."""
    bank = Features(torch.zeros(4, 3), torch.tensor([1, 1, 0, 0]))
    assert knn_accuracy(bank, bank, [2], 0.07)[2].top1 == 50.0


def test_k_is_clipped_to_the_bank_and_says_so() -> None:
    """Of ks beyond the bank one remains; asked and used are both told, the headline is named."""
    result = KNN().score(draw(15, 4, 3, seed=0), draw(7, 4, 3, seed=1))
    assert {k: row["asked"] for k, row in result["k"].items()} == {"10": [10], "15": [20, 100, 200]}
    assert result["top1_k"] == 15
    assert result["top1"] == result["k"]["15"]["top1"]
    assert "15 images" in result["protocol"]
    assert "7 images" in result["protocol"]


def test_without_queries_the_bank_is_one_smaller() -> None:
    """Leave-one-out clips k to the others, and the protocol names it."""
    result = KNN(ks=[200]).score(draw(15, 4, 3, seed=0), None)
    assert list(result["k"]) == ["14"]
    assert "leave-one-out on train" in result["protocol"]


def test_unlabeled_rows_take_no_part() -> None:
    """A label of -1 is no class: neither in the bank nor among the queries."""
    bank, queries = draw(30, 4, 3, seed=0), draw(20, 4, 3, seed=1)
    noise = draw(25, 4, 1, seed=2)
    noise = noise._replace(labels=noise.labels - 1)
    mixed = [
        Features(*map(torch.cat, zip(part[:2], noise[:2], strict=True))) for part in (bank, queries)
    ]
    assert KNN().score(*mixed) == KNN().score(bank, queries)


@pytest.mark.parametrize(
    ("bank", "queries", "words"),
    [
        (Features(torch.ones(5, 2), torch.zeros(5, dtype=torch.long)), None, "2 classes"),
        (Features(torch.ones(5, 2), -torch.ones(5, dtype=torch.long)), None, "2 classes"),
        (draw(9, 2, 3, 0), Features(torch.ones(5, 2), -torch.ones(5).long()), "no labeled test"),
        (Features(torch.full((4, 2), math.nan), torch.tensor([0, 1, 0, 1])), None, "diverged"),
    ],
    ids=["one class", "no labels", "no test labels", "not finite"],
)
def test_what_cannot_be_scored_is_a_sentence(
    bank: Features, queries: Features | None, words: str
) -> None:
    """One class, no labels, features that are not finite."""
    with pytest.raises(UserError, match=words):
        KNN().score(bank, queries)


@pytest.mark.parametrize(
    "wrong", [{"ks": []}, {"ks": [0]}, {"temperature": -0.07}, {"temperature": math.nan}]
)
def test_impossible_settings_are_refused(wrong: dict) -> None:
    """No k, k of 0, a temperature that is not above 0."""
    with pytest.raises(UserError, match=r"KNN\."):
        KNN(**wrong)


def shades(num: int, labeled: bool = True) -> ArraySource:
    """Dark images of class 0 and bright ones of class 1, in turn."""
    labels = np.arange(num) % 2
    noise = np.random.default_rng(num).integers(0, 40, (num, 16, 16, 3))
    pixels = torch.from_numpy((noise + 200 * labels[:, None, None, None]).astype(np.uint8))
    return ArraySource(pixels, labels if labeled else None, ["dark", "bright"], "shades")


@pytest.mark.parametrize("test", [shades(6), None, shades(6, labeled=False)])
def test_a_backbone_is_measured_on_test_or_by_leave_one_out(test: ArraySource | None) -> None:
    """An untrained network tells dark from bright, on test where it has labels."""
    data = CleanData(Splits(shades(20), test, "shades"), Preprocessing((16, 16)), batch_size=8)
    vit = ViT(image_size=16, patch_size=8, embed_dim=16, depth=1, num_heads=2)
    result = KNN(ks=[3])(vit, FeatureStore(data))
    assert result["top1"] == 100.0
    has_test = test is not None and test.labels is not None
    assert ("leave-one-out" in result["protocol"]) is not has_test


def test_data_without_labels_is_refused_before_any_work() -> None:
    """No feature is extracted where nothing could be scored."""
    data = CleanData(
        Splits(shades(20, labeled=False), None, "x"), Preprocessing((16, 16)), batch_size=8
    )
    vit = ViT(image_size=16, patch_size=8, embed_dim=16, depth=1, num_heads=2)
    vit.forward = None  # type: ignore[assignment]
    with pytest.raises(UserError, match="labels"):
        KNN()(vit, FeatureStore(data))


def test_predictions_are_the_classes_with_most_votes() -> None:
    """By a plain loop, in labels that are no row of numbers; their hits are the accuracy."""
    bank, queries = draw(60, 4, 5, seed=0), draw(30, 4, 5, seed=1)
    bank, queries = (part._replace(labels=7 + 1000 * part.labels) for part in (bank, queries))
    similarity = (unit(queries.features) @ unit(bank.features).T).tolist()
    expected = []
    for row in similarity:
        votes = dict.fromkeys(sorted(set(bank.labels.tolist())), 0.0)
        for j in sorted(range(60), key=lambda j: -row[j])[:9]:
            votes[int(bank.labels[j])] += math.exp(row[j] / 0.07)
        expected.append(max(votes, key=lambda c: votes[c]))
    found = knn_predict(queries, bank, 9, 0.07)
    assert found.tolist() == expected
    share = 100 * float((found == queries.labels).double().mean())
    assert knn_accuracy(queries, bank, [9], 0.07)[9].top1 == pytest.approx(share)


def test_predictions_of_the_bank_leave_each_row_out() -> None:
    """Alone with its class, no row is predicted as what it is."""
    bank = Features(torch.eye(4).repeat_interleave(2, dim=0), torch.arange(8))
    found = knn_predict(bank, bank, 1, leave_one_out=True)
    assert found.tolist() == [1, 0, 3, 2, 5, 4, 7, 6]


def test_probabilities_are_parts_of_all_votes() -> None:
    """Those at the largest k add up to 1, those at a smaller one to what its neighbors weigh."""
    similarity, classes = torch.tensor([[0.9, 0.5, 0.4]]), torch.tensor([[2, 0, 2]])
    found = dict(knn_probs(similarity, classes, [1, 3], 0.5, 3))
    total = math.exp(1.8) + math.exp(1.0) + math.exp(0.8)
    assert found[3][0].tolist() == pytest.approx(
        [math.exp(1.0) / total, 0, (math.exp(1.8) + math.exp(0.8)) / total]
    )
    assert found[1][0].tolist() == pytest.approx([0, 0, math.exp(1.8) / total])


def test_a_result_has_an_interval_and_the_mean_over_classes() -> None:
    """The interval lies about the headline; a class with few images counts like one with many."""
    features = torch.eye(3)[torch.tensor([0] * 8 + [1, 1] + [2, 2])]
    queries = Features(features, torch.tensor([0] * 8 + [1, 1] + [0, 2]))
    bank = Features(torch.eye(3), torch.arange(3))
    result = KNN(ks=[1]).score(bank, queries)
    assert result["top1"] == pytest.approx(100 * 11 / 12)
    assert result["per_class"] == pytest.approx(100 * (8 / 9 + 1 + 1) / 3)
    assert result["k"]["1"]["per_class"] == result["per_class"]
    assert result["interval"][0] < result["value"] <= result["interval"][1]
