"""The embedded set is the same everywhere, balanced, and not to be told apart by its pixels."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from dino_lite.contracts import UserError
from dino_lite.data.shapes import KINDS, draw, open_shapes
from dino_lite.data.sources import ArraySource
from dino_lite.draws import hashed


def source(**keys: int) -> ArraySource:
    """The train split."""
    train = open_shapes(**keys).train
    assert isinstance(train, ArraySource)
    return train


def test_bytes_are_those_of_every_other_machine() -> None:
    """Stored digests, of the usual size and of an odd one."""
    splits = open_shapes(num_train=50, num_test=20)
    assert splits.test is not None
    assert splits.train.digest() == "8d2ed9c678cd457b"
    assert splits.test.digest() == "678a53502f8ec7ad"
    assert source(num_train=20, num_test=0, image_size=45, seed=7).digest() == "cc213f68814af7a4"


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


def test_pixels_tell_the_kinds_apart_badly() -> None:
    """Weighted k-NN of raw pixels (k=20, T=0.07, centered): above chance, below 35 %."""
    splits = open_shapes(num_train=1500, num_test=400)
    assert splits.test is not None
    both = [
        np.stack([np.asarray(s.read(i)) for i in range(len(s))])
        for s in (splits.train, splits.test)
    ]
    rows = [images.reshape(len(images), -1) - both[0].reshape(1500, -1).mean(0) for images in both]
    bank, queries = (r / np.linalg.norm(r, axis=1, keepdims=True) for r in rows)
    cosine = queries @ bank.T
    assert splits.train.labels is not None
    assert splits.test.labels is not None
    votes = np.zeros((400, len(KINDS)))
    for near in np.argsort(-cosine, axis=1)[:, :20].T:
        weight = np.exp(cosine[np.arange(400), near] / 0.07)
        votes[np.arange(400), splits.train.labels[near]] += weight
    accuracy = (votes.argmax(1) == splits.test.labels).mean()
    assert 0.12 < accuracy < 0.35


@pytest.mark.parametrize("keys", [{"num_train": 0}, {"num_test": -1}, {"image_size": 4}])
def test_impossible_sizes_are_refused(keys: dict[str, int]) -> None:
    """In one sentence that names the key."""
    with pytest.raises(UserError, match=next(iter(keys))):
        open_shapes(**keys)


def test_a_worker_gets_the_same_pictures() -> None:
    """Pickled, as spawned workers get it."""
    train = source(num_train=20, num_test=0)
    assert pickle.loads(pickle.dumps(train)).digest() == train.digest()
