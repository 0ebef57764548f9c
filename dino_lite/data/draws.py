"""Random numbers without a state: each is a hash of (seed, epoch, sample, draw).

So crops and order depend on nothing else: not on workers, ranks, batch size or what was drawn
before. Only wrap-around products, xors and logical shifts of 64 bits are used, which every array
library has with the same bits.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float32, Int, Int64, UInt64

MASK = (1 << 64) - 1
GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio: consecutive keys land far apart
CROPS, ORDER, TURNS, GROUPS = range(4)  # streams: what numbers are for, so that they share none
WINDOW = 4096  # images that are mixed with each other where a source's images lie in groups
MIN_GROUPS = 4  # ... or as many groups, where these are larger


def mix(x: UInt64[np.ndarray, "..."]) -> UInt64[np.ndarray, "..."]:
    """A bijection of 64 bits in which each input bit flips about half of the output's.

    Source: the finalizer of SplitMix64 (Steele et al. 2014) with Stafford's constants "Mix13".
    """
    x = x ^ (x >> np.uint64(30))
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x


def hashed(seed: int, *keys: int | Int[np.ndarray, "..."]) -> UInt64[np.ndarray, "..."]:
    """64 bits for each combination of keys, which broadcast: h ← mix(h + key·GOLDEN) by key."""
    state = mix(np.array([seed & MASK], np.uint64) + GOLDEN)
    for key in keys:
        state = mix(state + np.asarray(key, np.int64).astype(np.uint64) * GOLDEN)
    return state


def uniforms(
    seed: int,
    epoch: int | Int[np.ndarray, "n"],
    samples: Int[np.ndarray, "n"],
    num: int,
    stream: int = CROPS,
) -> Float32[np.ndarray, "n num"]:
    """Draws 0 to num-1 of each sample in its epoch, uniform on the multiples of 2^-24 in [0, 1)."""
    columns = np.arange(num)
    bits = hashed(seed, stream, np.reshape(epoch, (-1, 1)), samples[:, None], columns)  # n num
    return (bits >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)


def permutation(seed: int, epoch: int, n: int) -> Int64[np.ndarray, "n"]:
    """The order of n samples in an epoch: they are sorted by their hash."""
    keys = hashed(seed, ORDER, epoch, np.arange(n))
    # 63 bits, which signed and unsigned integers sort alike; ties keep their order.
    return np.argsort(keys >> np.uint64(1), kind="stable").astype(np.int64)


def groups_per_window(groups: Int64[np.ndarray, "bounds"]) -> int:
    """How many groups are open at a time in the order of `grouped_permutation`."""
    num_images, num_groups = int(groups[-1]), len(groups) - 1
    return max(MIN_GROUPS, -(-WINDOW * num_groups // num_images))


def grouped_permutation(
    seed: int, epoch: int, groups: Int64[np.ndarray, "bounds"]
) -> Int64[np.ndarray, "n"]:
    """The order of n samples in an epoch where neighbors are cheap to read together.

    Group g holds samples groups[g] to groups[g+1]: a shard, a row group. Groups are shuffled; so
    are the samples of each window of `groups_per_window` groups in a row. Samples whose groups are
    the same window's meet in one batch, others do not: where images are sorted, pack them anew.
    """
    num_groups = len(groups) - 1
    window = np.empty(num_groups, np.int64)
    shuffled = np.argsort(hashed(seed, GROUPS, epoch, np.arange(num_groups)), kind="stable")
    window[shuffled] = np.arange(num_groups) // groups_per_window(groups)
    keys = hashed(seed, ORDER, epoch, np.arange(groups[-1]))
    return np.lexsort((keys, np.repeat(window, np.diff(groups)))).astype(np.int64)
