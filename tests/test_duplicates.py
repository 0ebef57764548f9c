"""Equal and near keys among many: against all pairs."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dino_lite.data.hashing import bits_apart, equal_groups, near_groups

BIT = [np.uint64(1 << i) for i in range(64)]


def all_pairs(hashes: np.ndarray, distance: int) -> list[int]:
    """The slow way: join whatever is near until nothing changes."""
    groups = list(range(len(hashes)))
    changed = True
    while changed:
        changed = False
        for i, a in enumerate(hashes.tolist()):
            for j, b in enumerate(hashes.tolist()):
                if bin(a ^ b).count("1") <= distance and groups[i] != groups[j]:
                    groups[i] = groups[j] = min(groups[i], groups[j])
                    changed = True
    return groups


def changed_bits(base: int, num: int, generator: np.random.Generator) -> int:
    """`base` with `num` bits turned over."""
    for bit in generator.choice(64, num, replace=False).tolist():
        base ^= 1 << bit
    return base


def test_equal_keys_share_the_position_of_the_first() -> None:
    """Groups are named by the first of their members."""
    keys = np.array([7, 3, 7, 2**63, 3, 2**63 + 1], np.uint64)
    assert equal_groups(keys).tolist() == [0, 1, 0, 3, 1, 5]


def test_no_key_makes_no_group() -> None:
    """An empty set is no special case."""
    nothing = np.array([], np.uint64)
    assert equal_groups(nothing).tolist() == near_groups(nothing).tolist() == []


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 9)), max_size=25),
    st.integers(0, 6),
    st.integers(0, 1000),
)
def test_near_groups_are_those_of_all_pairs(
    asked: list[tuple[int, int]], distance: int, seed: int
) -> None:
    """Whatever lies around a few centers, at distances around the limit, chains included."""
    generator = np.random.default_rng(seed)
    centers = generator.integers(0, 2**64, 4, dtype=np.uint64).tolist()
    found = [changed_bits(centers[center], num, generator) for center, num in asked]
    hashes = np.array(found, np.uint64)
    assert near_groups(hashes, distance).tolist() == all_pairs(hashes, distance)


@pytest.mark.parametrize("distance", [1, 4])
def test_every_place_of_the_wrong_bits_is_found(distance: int) -> None:
    """Bands leave no blind spot: neighboring bits, bits far apart, the first and the last."""
    generator = np.random.default_rng(0)
    centers = generator.integers(0, 2**64, 300, dtype=np.uint64)
    others = [changed_bits(center, distance, generator) for center in centers.tolist()]
    groups = near_groups(np.concatenate([centers, np.array(others, np.uint64)]), distance)
    assert groups.tolist() == [*range(300), *range(300)]


def test_one_bit_more_than_the_limit_is_apart() -> None:
    """The limit is exact."""
    hashes = np.array([0, sum(1 << i for i in range(0, 40, 8))], np.uint64)  # five bits
    assert near_groups(hashes, 4).tolist() == [0, 1]
    assert near_groups(hashes, 5).tolist() == [0, 0]


def test_a_dense_crowd_is_joined_beyond_what_is_held_side_by_side() -> None:
    """Thousands of hashes that agree in most bits, as of scanned pages, become one group."""
    near = [BIT[i] | BIT[j] | BIT[k] for i in range(20) for j in range(i) for k in range(j)]
    hashes = np.array(near, np.uint64)
    assert len(hashes) > 1000
    assert set(near_groups(hashes, 2).tolist()) == {0}


def test_bits_apart_counts_bits() -> None:
    """Hamming distance of 64 bits, none lost at the ends."""
    a = np.array([0, 2**64 - 1, 5], np.uint64)
    b = np.array([2**64 - 1, 2**64 - 1, 6], np.uint64)
    assert bits_apart(a, b).tolist() == [64, 0, 2]
