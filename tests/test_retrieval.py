"""Retrieval against plain loops over rankings."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dino_lite.contracts import UserError
from dino_lite.eval import retrieval as module
from dino_lite.eval.features import Features
from dino_lite.eval.retrieval import Retrieval, rank_classes
from test_knn import draw
from test_neighbors import in_quarters


def loops(queries: Features, bank: Features, leave_one_out: bool) -> list[tuple[float, int]]:
    """Average precision and the first hit's place, query by query, equals all at once."""
    similarity = (queries.features @ bank.features.T).tolist()
    found = []
    for i, row in enumerate(similarity):
        others = [j for j in range(len(row)) if not (leave_one_out and j == i)]
        precisions, first = [], len(row)
        for j in others:
            if bank.labels[j] == queries.labels[i]:
                before = [other for other in others if row[other] >= row[j]]
                own = [other for other in before if bank.labels[other] == queries.labels[i]]
                precisions.append(len(own) / len(before))
                first = min(first, len(before) - 1)
        precision = sum(precisions) / len(precisions) if precisions else math.nan
        found.append((precision, first))
    return found


@pytest.mark.slow
@given(
    num_queries=st.integers(1, 9),
    num_bank=st.integers(1, 40),
    num_classes=st.integers(1, 6),
    leave_one_out=st.booleans(),
    cells=st.integers(1, 200),
    seed=st.integers(0, 100),
)
def test_ranking_equals_plain_loops(
    num_queries: int, num_bank: int, num_classes: int, leave_one_out: bool, cells: int, seed: int
) -> None:
    """Equals, classes that are not in the bank, queries one by one or all at once."""
    labels = draw(num_bank + num_queries, 1, num_classes, seed).labels * 1_000_003
    bank = Features(in_quarters(num_bank, 6, seed), labels[:num_bank])
    queries = Features(in_quarters(num_queries, 6, seed + 1), labels[num_bank:])
    queries = bank if leave_one_out else queries
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_CELLS", cells)
        found = rank_classes(queries, bank, leave_one_out=leave_one_out)
    expected = loops(queries, bank, leave_one_out)
    assert found.precision.tolist() == pytest.approx([a for a, _ in expected], nan_ok=True)
    assert found.first.tolist() == [b for _, b in expected]


def test_map_and_recall_are_means_over_queries_that_have_something_to_find() -> None:
    """Three classes, one of which train does not have."""
    bank = Features(torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]]), torch.tensor([4, 6, 4]))
    asked = torch.tensor([[1.0, 0.0], [1.0, 0.1], [1.0, 0.0]])
    result = Retrieval(ks=[1, 2]).score(bank, Features(asked, torch.tensor([4, 6, 8])))
    assert result["value"] == pytest.approx(100 * ((1 + 2 / 3) / 2 + 1 / 2) / 2)
    assert result["recall"] == {"1": 50.0, "2": 100.0}
    assert result["num_test"] == 2
    assert "1 without an image to find are left out" in result["protocol"]
    assert result["interval"] is not None


def test_without_test_images_each_of_train_is_left_out_once() -> None:
    """Pairs of equals find each other at once."""
    bank = Features(torch.eye(4).repeat_interleave(2, dim=0), torch.arange(4).repeat_interleave(2))
    result = Retrieval().score(bank, None)
    assert result["value"] == 100.0
    assert "leave-one-out" in result["protocol"]


def test_equal_features_are_no_better_than_chance() -> None:
    """However the classes lie in the bank: a collapsed network finds what there is to find by
    chance, and nothing among the first.
    """
    bank = Features(torch.ones(40, 4), torch.arange(8).repeat_interleave(5))
    result = Retrieval().score(bank, None)
    assert result["value"] == pytest.approx(100 * 4 / 39)
    assert result["recall"] == {"1": 0.0, "5": 0.0, "10": 0.0}


def test_unlabeled_rows_take_no_part() -> None:
    """Neither asked nor found."""
    bank, queries = draw(30, 4, 3, seed=0), draw(20, 4, 3, seed=1)
    hidden = bank._replace(labels=bank.labels.where(torch.arange(30) < 20, -1))
    assert Retrieval().score(hidden, queries) == Retrieval().score(
        bank.rows(torch.arange(20)), queries
    )


def test_what_cannot_be_ranked_is_a_sentence() -> None:
    """No two images of a class, no number of images, features that are not finite."""
    with pytest.raises(UserError, match=r"Retrieval\.ks"):
        Retrieval(ks=[0])
    with pytest.raises(UserError, match="share their class"):
        Retrieval().score(Features(torch.eye(3), torch.arange(3)), None)
    with pytest.raises(UserError, match="diverged"):
        Retrieval().score(Features(torch.full((4, 2), math.nan), torch.tensor([0, 1, 0, 1])), None)
