"""Images that a backbone can hardly tell apart, against all pairs."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dino_lite.contracts import Backbone, Splits, UserError
from dino_lite.data.clean import CleanData
from dino_lite.data.preprocessing import Preprocessing
from dino_lite.data.sources import ArraySource
from dino_lite.eval import duplicates as module
from dino_lite.eval import neighbors
from dino_lite.eval.baselines import raw_pixels
from dino_lite.eval.duplicates import Duplicates, similar_pairs
from dino_lite.eval.store import FeatureStore
from test_neighbors import in_quarters


def all_pairs(rows: Tensor, num_train: int, threshold: float) -> list[tuple[int, int]]:
    """Most similar first, then in order."""
    similarity = (rows @ rows.T).tolist()
    pairs = [
        (i, j)
        for i in range(num_train)
        for j in range(i + 1, len(rows))
        if similarity[i][j] >= threshold
    ]
    return sorted(pairs, key=lambda pair: (-similarity[pair[0]][pair[1]], pair))


@given(
    num=st.integers(1, 40),
    part=st.floats(0, 1),
    threshold=st.sampled_from([0.5, 0.75, 1.0]),
    block=st.integers(1, 50),
    cells=st.integers(1, 300),
    seed=st.integers(0, 100),
)
def test_pairs_equal_a_plain_loop(
    num: int, part: float, threshold: float, block: int, cells: int, seed: int
) -> None:
    """Within train, and between train and test but not within it, in blocks and tiles of any
    size.
    """
    rows, num_train = in_quarters(num, 5, seed), round(part * num)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_QUERIES", block)
        patch.setattr(neighbors, "_CELLS", cells)
        found = similar_pairs(rows, num_train, threshold)
    expected = all_pairs(rows, num_train, threshold)
    assert list(zip(found.first.tolist(), found.second.tolist(), strict=True)) == expected
    assert found.total == len(expected)


def test_too_many_pairs_are_counted_and_the_best_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where everything is like everything, memory is bounded."""
    rows = in_quarters(40, 5, seed=0)
    monkeypatch.setattr(module, "_MOST", 20)
    monkeypatch.setattr(module, "_QUERIES", 3)
    found, everything = similar_pairs(rows, 40, 0.25), all_pairs(rows, 40, 0.25)
    assert found.total == len(everything) > 100
    best = [float(rows[i] @ rows[j]) for i, j in everything[:20]]
    assert found.similarity.tolist() == best


def store_of(train: np.ndarray, test: np.ndarray | None) -> FeatureStore:
    """Images as they are."""
    sources = [
        None if part is None else ArraySource(torch.from_numpy(part), None, [], name)
        for part, name in ((train, "inner"), (test, "outer"))
    ]
    splits = Splits(cast(Any, sources[0]), sources[1], "set")
    return FeatureStore(CleanData(splits, Preprocessing((16, 16)), batch_size=4))


@pytest.fixture
def images() -> np.ndarray:
    """Eight of noise, of which no two are alike."""
    return np.random.default_rng(0).integers(0, 256, (8, 16, 16, 3), np.uint8)


def pixels_of(store: FeatureStore) -> Backbone:
    return raw_pixels(store.data, 8, 16)


def test_repeats_and_leaks_are_found_by_name(images: np.ndarray, tmp_path: Path) -> None:
    """A copy within train, another in test: two pairs and a third by the copy, all in the file."""
    train = np.concatenate([images[:5], images[1:2]])
    test = np.concatenate([images[5:], images[1:2]])
    store = store_of(train, test)
    out = tmp_path / "found" / "pairs.csv"
    result = Duplicates(out=str(out))(pixels_of(store), store)
    assert (result["value"], result["unit"]) == (3, "pairs")
    assert result["num_groups"] == 1
    assert result["num_surplus"] == 2
    assert result["num_test_images_in_train"] == 1
    names = {"train": store.data.splits.train.name, "test": cast(Any, store.data.splits.test).name}
    expected = [("train", 1, 5), ("test", 1, 3), ("test", 5, 3)]
    rows = [
        {
            "similarity": "1.0000",
            "image of train": names["train"](first),
            "split": split,
            "again as": names[split](second),
        }
        for split, first, second in expected
    ]

    def sort(found: list[dict[str, str]]) -> list[dict[str, str]]:
        """Rounding may put one of three equals before another."""
        return sorted(found, key=lambda row: list(row.values()))

    assert sort(result["table"]) == sort(rows)
    with open(out, newline="") as file:
        assert sort(list(csv.DictReader(file))) == sort(rows)


def test_images_that_differ_are_no_pair(images: np.ndarray) -> None:
    """Labels are not needed, nor a test split; the table is empty."""
    store = store_of(images, None)
    result = Duplicates()(pixels_of(store), store)
    assert (result["value"], result["table"], result["num_test"]) == (0, [], 0)


def test_what_cannot_be_done_is_a_sentence(images: np.ndarray, tmp_path: Path) -> None:
    """A threshold that is no cosine, a file that cannot be written."""
    with pytest.raises(UserError, match=r"Duplicates\.threshold=1\.5"):
        Duplicates(threshold=1.5)
    store = store_of(images, None)
    with pytest.raises(UserError, match=r"eval\.duplicates\.out=.* cannot be written"):
        Duplicates(out=str(tmp_path))(pixels_of(store), store)


def test_it_is_not_asked_of_baselines() -> None:
    """What the file lists are the pairs of the backbone asked for, not those of another."""
    from dino_lite.eval.knn import KNN
    from dino_lite.eval.measure import comparable

    asked = {"duplicates": Duplicates(threshold=0.2), "knn": KNN()}
    assert comparable(asked).keys() == {"knn"}


def test_the_file_may_lie_at_home(monkeypatch: pytest.MonkeyPatch) -> None:
    """`~` in eval.duplicates.out is expanded; the configurations build what they name."""
    from dino_lite.config import compose
    from dino_lite.runs.identity import absolute_paths
    from dino_lite.runs.subject import build_evaluations

    monkeypatch.setenv("HOME", "/somewhere")
    config = compose(
        "evaluate", ["eval=[knn,fewshot,retrieval,duplicates]", "eval.duplicates.out='~/x.csv'"]
    )
    built = build_evaluations(absolute_paths(config))
    assert list(built) == ["knn", "fewshot", "retrieval", "duplicates"]
    assert built["duplicates"].out == Path("/somewhere/x.csv")
