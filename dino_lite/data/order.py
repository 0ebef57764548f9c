"""The order of samples in an epoch: a permutation that is a function of the seed."""

from __future__ import annotations

import numpy as np
from jaxtyping import Int64

from dino_lite.draws import GROUPS, ORDER, hashed

WINDOW = 4096  # images shuffled together if a source has groups
MIN_GROUPS = 4  # ... or this many groups, if that is more


def permutation(seed: int, epoch: int, n: int) -> Int64[np.ndarray, "n"]:
    """The order of n samples in an epoch, sorted by their hashes."""
    keys = hashed(seed, ORDER, epoch, np.arange(n))
    # 63 bits, which signed and unsigned integers sort alike; ties keep their order.
    return np.argsort(keys >> np.uint64(1), kind="stable").astype(np.int64)


def groups_per_window(groups: Int64[np.ndarray, "bounds"]) -> int:
    """The number of groups read at a time in the order of `grouped_permutation`."""
    num_images, num_groups = int(groups[-1]), len(groups) - 1
    return max(MIN_GROUPS, -(-WINDOW * num_groups // num_images))


def grouped_permutation(
    seed: int, epoch: int, groups: Int64[np.ndarray, "bounds"]
) -> Int64[np.ndarray, "n"]:
    """The order of n samples in an epoch that keeps samples of a group near each other.

    Group g holds samples groups[g] to groups[g+1]: a shard, a row group. Groups are shuffled, and
    so are the samples of every `groups_per_window` consecutive groups. Only samples of one window
    can meet in a batch: data sorted by class should be packed anew.
    """
    num_groups = len(groups) - 1
    window = np.empty(num_groups, np.int64)
    shuffled = np.argsort(hashed(seed, GROUPS, epoch, np.arange(num_groups)), kind="stable")
    window[shuffled] = np.arange(num_groups) // groups_per_window(groups)
    keys = hashed(seed, ORDER, epoch, np.arange(groups[-1]))
    return np.lexsort((keys, np.repeat(window, np.diff(groups)))).astype(np.int64)
