"""The counter hash: uniform, independent between neighboring keys, and the same forever."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dino_lite import draws
from dino_lite.data import order

MASK = 2**64 - 1


def by_hand(*keys: int) -> int:
    """The hash in Python's integers, written from its definition."""

    def mix(x: int) -> int:
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
        return x ^ (x >> 31)

    state = mix((keys[0] + 0x9E3779B97F4A7C15) & MASK)
    for key in keys[1:]:
        state = mix((state + key * 0x9E3779B97F4A7C15) & MASK)
    return state


@given(seed=st.integers(-(2**70), 2**70), epoch=st.integers(0, 2**40), sample=st.integers(0, 2**40))
def test_draws_follow_their_definition(seed: int, epoch: int, sample: int) -> None:
    """The arrays hold what the definition gives in exact integers, for any key."""
    found = draws.uniforms(seed, epoch, np.array([sample]), 3)[0]
    wanted = [(by_hand(seed, draws.CROPS, epoch, sample, d) >> 40) / 2**24 for d in range(3)]
    assert found.tolist() == wanted


def test_values_never_change() -> None:
    """Stored numbers: a run that is resumed by a later version must see the same crops."""
    found = draws.uniforms(7, np.array([0, 3]), np.array([0, 10**6]), 3)
    assert (found * 2**24).tolist() == [
        [845708.0, 1915141.0, 3604737.0],
        [13585165.0, 2127081.0, 11460931.0],
    ]
    assert order.permutation(7, 2, 10).tolist() == [8, 0, 5, 9, 6, 3, 1, 4, 2, 7]


def grid(num_samples: int = 400, num: int = 50) -> np.ndarray:
    """Uniforms over 5 epochs of neighboring samples: epoch, sample, draw."""
    samples = np.arange(num_samples)
    return np.stack([draws.uniforms(1, epoch, samples, num) for epoch in range(5)])


def test_uniforms_are_uniform() -> None:
    """Mean, variance and the largest distance from the even distribution, each within 4 sigma."""
    u = np.sort(grid().astype(np.float64).ravel())
    n = len(u)
    assert u[0] >= 0
    assert u[-1] < 1
    assert abs(u.mean() - 1 / 2) < 4 * np.sqrt(1 / 12 / n)
    assert abs(u.var() - 1 / 12) < 4 * np.sqrt(1 / 180 / n)
    assert np.abs(u - (np.arange(n) + 0.5) / n).max() < 1.95 / np.sqrt(n)


@pytest.mark.parametrize("axis", [0, 1, 2], ids=["epoch", "sample", "draw"])
def test_neighboring_keys_are_not_correlated(axis: int) -> None:
    """Draws whose keys differ by one share nothing linear, nor their distance from the middle."""
    u = np.moveaxis(grid().astype(np.float64), axis, 0)
    for values in (u - 1 / 2, np.abs(u - 1 / 2)):
        a, b = values[:-1].ravel(), values[1:].ravel()
        assert abs(np.corrcoef(a, b)[0, 1]) < 4 / np.sqrt(len(a))


def test_seeds_do_not_repeat_each_other() -> None:
    """Neither seed, epoch nor sample can stand in for another."""
    sample = np.array([2])
    seen = {
        draws.uniforms(a, b, c * sample, 1).item()
        for a in (0, 1, 2)
        for b in (0, 1, 2)
        for c in (0, 1, 2)
    }
    assert len(seen) == 27


def test_each_input_bit_moves_half_of_the_output() -> None:
    """Avalanche: flipping any bit of a sample's index flips 32 of 64 bits, on average."""
    samples = np.arange(500)
    plain = draws.hashed(0, 0, samples)
    for bit in range(40):
        flipped = draws.hashed(0, 0, samples ^ (1 << bit))
        changed = np.unpackbits((plain ^ flipped).view(np.uint8)).mean()
        assert abs(changed - 0.5) < 5 * 0.5 / np.sqrt(64 * len(samples))


@given(seed=st.integers(0, 100), epoch=st.integers(0, 100), n=st.integers(1, 300))
def test_permutation_holds_every_sample_once(seed: int, epoch: int, n: int) -> None:
    """A permutation, whatever the size."""
    assert sorted(order.permutation(seed, epoch, n).tolist()) == list(range(n))


def test_permutations_put_each_sample_anywhere() -> None:
    """Over 2000 epochs each of 6 samples stands at each of 6 places equally often (chi-square)."""
    orders = np.stack([order.permutation(0, epoch, 6) for epoch in range(2000)])
    counts = np.stack([(orders == sample).sum(0) for sample in range(6)])
    chi_square = ((counts - 2000 / 6) ** 2 / (2000 / 6)).sum()
    assert chi_square < 52.6  # 25 degrees of freedom, p = 0.001
