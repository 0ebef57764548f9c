"""The embedded set is the same everywhere, balanced, and not to be told apart by its pixels."""

from __future__ import annotations

import numpy as np
import pytest

from dino_lite.data.draws import hashed
from dino_lite.data.shapes import KINDS, draw, open_shapes
from dino_lite.data.sources import ArraySource


def source(**keys: int) -> ArraySource:
    """The train split."""
    train = open_shapes(**keys).train
    assert isinstance(train, ArraySource)
    return train


def test_bytes_are_those_of_every_other_machine() -> None:
    """Stored digests, of the usual size and of an odd one."""
    splits = open_shapes(num_train=50, num_test=20)
    assert splits.test is not None
    assert splits.train.digest() == "2a6758de55230ae0"
    assert splits.test.digest() == "e8e96ba7d77e4b0f"
    assert source(num_train=20, num_test=0, image_size=45, seed=7).digest() == "30e40332df5fbbb9"


def test_pictures_do_not_depend_on_how_many_there_are() -> None:
    """A longer set begins with the shorter one, labels included."""
    few, many = source(num_train=33, num_test=0), source(num_train=57, num_test=9)
    assert np.array_equal(few.images, many.images[:33])
    assert few.labels is not None
    assert many.labels is not None
    assert few.labels.tolist() == many.labels[:33].tolist()


def test_no_picture_comes_twice() -> None:
    """Not within a split, not in train and test, not in another seed."""
    splits = open_shapes(num_train=300, num_test=300)
    assert splits.test is not None
    three = (splits.train, splits.test, source(num_train=300, num_test=0, seed=1))
    assert len({some.read(i).tobytes() for some in three for i in range(300)}) == 900


@pytest.mark.parametrize("seed", [0, 1, 12345])
def test_each_ten_in_a_row_have_all_kinds_in_changing_order(seed: int) -> None:
    """Balanced at any length, and no stride through the set meets few kinds only."""
    labels = source(num_train=1000, num_test=0, image_size=8, seed=seed).labels
    assert labels is not None
    rows = labels.reshape(-1, 10)
    assert np.array_equal(np.sort(rows, axis=1), np.tile(np.arange(10), (100, 1)))
    assert all(len(set(column)) == 10 for column in rows.T.tolist())


def test_names_say_what_is_drawn() -> None:
    """Classes are the kinds, in the same order in both splits."""
    splits = open_shapes(num_train=10, num_test=10)
    assert splits.name == "shapes"
    assert splits.test is not None
    assert splits.train.classes == splits.test.classes == list(KINDS)
    assert splits.train.name(3) == "shapes/train[3]"


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_shows_its_elements_at_any_size(kind: str) -> None:
    """A fifth to four fifths of it are covered, and 96 pixels show what 32 do, only sharper."""
    keys = hashed(0, 5, np.arange(60))
    small, large = (draw(KINDS[kind], keys, size).astype(float) for size in (32, 96))
    means = large.reshape(60, 32, 3, 32, 3, 3).mean((2, 4))
    assert np.abs(means - small).mean() < 6  # of 255: the same picture, only sharper
    ground = draw(lambda k, u, v: (k, np.ones_like(u + v)), keys, 96).astype(float)
    covered = (np.abs(large - ground).max(-1) > 8).mean()
    assert 0.2 < covered < 0.8
