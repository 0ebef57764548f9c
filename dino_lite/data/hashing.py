"""Exact and near duplicates among up to millions of images."""

from __future__ import annotations

from itertools import combinations, pairwise

import numpy as np
from jaxtyping import Int64, UInt64

NEAR = 4  # of 64 bits of perceptual hashes; a million random hashes have 0.02 such pairs
_MOST_BESIDE = 1000  # comparisons per hash among those that agree in a third of the bits
_NUM_BITS = np.array([bin(byte).count("1") for byte in range(256)], np.uint8)


def equal_groups(keys: UInt64[np.ndarray, "n"]) -> Int64[np.ndarray, "n"]:
    """For each key the position of the first equal key: equal keys form a group."""
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    groups: np.ndarray = first[inverse]
    return groups


def near_groups(hashes: UInt64[np.ndarray, "n"], distance: int = NEAR) -> Int64[np.ndarray, "n"]:
    """For each hash the position of the first hash in its group. Groups are the connected
    components of pairs within `distance` bits.

    `distance` differing bits leave at least two of distance + 2 bands of bits equal, so near hashes
    are neighbors once sorted by the right pair of bands. Pairs can be missed only if more than 1000
    different hashes agree in a whole pair of bands.
    """
    distinct, first, inverse = np.unique(hashes, return_index=True, return_inverse=True)
    roots = np.arange(len(distinct))
    borders = np.linspace(0, 64, distance + 3).astype(int).tolist()
    bands = [(1 << stop) - (1 << start) for start, stop in pairwise(borders)]
    for one, other in combinations(bands, 2):
        _link(roots, distinct, np.uint64(one | other), distance)
    lowest = np.full(len(distinct), len(hashes))
    np.minimum.at(lowest, roots, first)
    groups: np.ndarray = lowest[roots][inverse]
    return groups


def linked_groups(
    num: int, a: Int64[np.ndarray, "k"], b: Int64[np.ndarray, "k"]
) -> Int64[np.ndarray, "n"]:
    """For each of `num` positions the first of its group, the connected component of `pairs`."""
    roots = np.arange(num)
    _join(roots, a, b)
    return roots


def _link(
    roots: Int64[np.ndarray, "n"], hashes: UInt64[np.ndarray, "n"], mask: np.uint64, distance: int
) -> None:
    """Join, in `roots`, hashes within `distance` that agree in the bits of `mask`."""
    masked = hashes & mask
    order = np.argsort(masked, kind="stable")
    masked = masked[order]
    left = np.arange(len(hashes) - 1)
    for beside in range(1, _MOST_BESIDE + 1):
        left = left[left < len(hashes) - beside]
        left = left[masked[left] == masked[left + beside]]  # the others have no further match
        if not len(left):
            return
        a, b = order[left], order[left + beside]
        apart = roots[a] != roots[b]
        a, b = a[apart], b[apart]
        near = bits_apart(hashes[a], hashes[b]) <= distance
        _join(roots, a[near], b[near])


def bits_apart(a: UInt64[np.ndarray, "n"], b: UInt64[np.ndarray, "n"]) -> Int64[np.ndarray, "n"]:
    """Hamming distance of each pair."""
    num: np.ndarray = _NUM_BITS[(a ^ b).view(np.uint8)].reshape(-1, 8).sum(1, dtype=np.int64)
    return num


def _join(
    roots: Int64[np.ndarray, "n"], a: Int64[np.ndarray, "k"], b: Int64[np.ndarray, "k"]
) -> None:
    """Merge the groups of each pair: every member points directly at the lowest of its group."""
    while len(a):
        low, high = np.minimum(roots[a], roots[b]), np.maximum(roots[a], roots[b])
        np.minimum.at(roots, high, low)
        while not np.array_equal(above := roots[roots], roots):
            roots[:] = above
        apart = roots[a] != roots[b]  # a group in two pairs has followed only one of them
        a, b = a[apart], b[apart]
