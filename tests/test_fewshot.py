"""k-NN with few labels: who is drawn, who is asked, and what is told of several tries."""

from __future__ import annotations

import statistics

import pytest
import torch

from dino_lite.contracts import UserError
from dino_lite.eval.features import Features
from dino_lite.eval.fewshot import FewShot, draw_few
from dino_lite.eval.knn import knn_accuracy
from test_knn import draw


def test_each_class_gives_so_many_and_a_small_one_all() -> None:
    """Class after class, none twice, another seed another draw."""
    labels = torch.tensor([5, 2, 5, 2, 5, 9, 5, 2])
    rows = draw_few(labels, 2, seed=0)
    assert labels[rows].tolist() == [2, 2, 5, 5, 9]
    assert len(set(rows.tolist())) == 5
    draws = {tuple(draw_few(labels, 2, seed).tolist()) for seed in range(10)}
    assert len(draws) > 1
    assert torch.equal(draw_few(labels, 2, 0), rows)


def test_draws_leave_the_global_generator_alone() -> None:
    """Seeds are its own."""
    state = torch.random.get_rng_state()
    draw_few(torch.arange(10) % 3, 2, seed=4)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_mean_and_deviation_are_those_of_the_tries() -> None:
    """Each try's accuracy computed apart; k is clipped to the bank of each n."""
    train, test = draw(80, 4, 4, seed=0), draw(50, 4, 4, seed=1)
    result = FewShot(nums=[5, 2], num_tries=3, k=10).score(train, test)
    assert [row["images a class"] for row in result["table"]] == [2, 5]
    for row, num, k in zip(result["table"], (2, 5), (8, 10), strict=True):
        banks = [train.rows(draw_few(train.labels, num, seed)) for seed in range(3)]
        tries = [knn_accuracy(test, bank, [k], 0.07)[k].top1 for bank in banks]
        assert row["k"] == k
        assert row["top-1 %"] == pytest.approx(statistics.mean(tries))
        assert row["± std"] == pytest.approx(statistics.stdev(tries))
    assert result["value"] == pytest.approx(result["table"][1]["top-1 %"])
    assert result["interval"][0] < result["value"] < result["interval"][1]
    assert "interval is over queries, ± std over draws" in result["protocol"]
    assert result["settings"] == {"n": 5, "tries": 3, "k": 10}
    assert (result["num_train"], result["num_test"]) == (20, 50)


def test_with_one_split_the_rest_is_asked() -> None:
    """No image is asked in a try that has its label."""
    train = draw(40, 4, 4, seed=0)
    result = FewShot(nums=[3], num_tries=2, k=5).score(train, None)
    tries = []
    for seed in range(2):
        drawn = draw_few(train.labels, 3, seed)
        rest = [i for i in range(40) if i not in drawn.tolist()]
        queries = train.rows(torch.tensor(rest))
        tries.append(knn_accuracy(queries, train.rows(drawn), [5], 0.07)[5].top1)
    assert result["value"] == pytest.approx(statistics.mean(tries))
    assert "left over" in result["protocol"]
    assert result["num_train"] == 12


def test_a_number_that_the_classes_do_not_have_is_reported_as_reduced() -> None:
    """To the largest class, less a query with one split; smaller classes are counted."""
    labels = torch.tensor([0] * 12 + [1] * 12 + [2] * 3)
    train = Features(torch.randn(27, 4, generator=torch.Generator().manual_seed(0)), labels)
    found = FewShot(nums=[2, 10, 20, 30]).score(train, draw(9, 4, 3, seed=1))
    assert [row["images a class"] for row in found["table"]] == [2, 10, 12]
    assert found["settings"]["n"] == 12
    assert found["notes"] == [
        "n=20, 30 reduced to 12, the size of the largest class",
        "n=10: 1 of 3 classes have fewer; all their images were used",
        "n=12: 1 of 3 classes have fewer; all their images were used",
    ]
    alone = FewShot(nums=[12], num_tries=2).score(train, None)
    assert alone["settings"]["n"] == 11
    assert alone["num_train"] == 25
    assert alone["notes"] == [
        "n=12 reduced to 11, less a query of the largest class",
        "n=11: 1 of 3 classes have fewer; all their images were used and none is a query",
    ]
    assert "notes" not in FewShot(nums=[2]).score(train, None)


def test_one_try_has_no_deviation() -> None:
    """And unlabeled rows take no part."""
    train, test = draw(40, 4, 4, seed=0), draw(20, 4, 4, seed=1)
    hidden = train._replace(labels=train.labels.where(torch.arange(40) < 30, -1))
    result = FewShot(nums=[2], num_tries=1).score(hidden, test)
    assert result["table"][0]["± std"] == 0
    known = train.rows(torch.arange(30))
    assert result == FewShot(nums=[2], num_tries=1).score(known, test)


@pytest.mark.parametrize(
    "wrong", [{"nums": []}, {"nums": [0, 5]}, {"num_tries": 0}, {"k": 0}, {"temperature": 0.0}]
)
def test_impossible_settings_are_refused(wrong: dict) -> None:
    """No number of images, none of them, no try, no neighbor, no temperature."""
    with pytest.raises(UserError, match=r"FewShot\."):
        FewShot(**wrong)


@pytest.mark.parametrize(
    ("train", "test", "words"),
    [
        (Features(torch.ones(5, 2), torch.zeros(5).long()), None, "2 classes"),
        (draw(9, 2, 3, 0), Features(torch.ones(5, 2), -torch.ones(5).long()), "no labeled test"),
        (Features(torch.full((4, 2), float("nan")), torch.tensor([0, 1, 0, 1])), None, "diverged"),
        (Features(torch.ones(3, 2), torch.arange(3)), None, "leaves no query"),
    ],
    ids=["one class", "no test labels", "not finite", "one image per class"],
)
def test_what_cannot_be_scored_is_a_sentence(
    train: Features, test: Features | None, words: str
) -> None:
    """One class, no labels, features that are not finite, nobody left to ask."""
    with pytest.raises(UserError, match=words):
        FewShot(nums=[9]).score(train, test)
