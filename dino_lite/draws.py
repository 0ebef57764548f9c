"""Counter-based random numbers: each is a hash of its keys, such as (seed, epoch, sample, draw).

Crops, order and masks therefore depend on nothing else: not on workers, ranks or earlier draws.
Uses only 64-bit wrap-around products, xors and logical shifts, which are bit-identical in every
array library.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float32, Int, UInt64

MASK = (1 << 64) - 1
GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio: spreads consecutive keys
# Streams: one per purpose, so that no two share random numbers.
CROPS, ORDER, TURNS, GROUPS, MASKS, RATIOS, BLOCKS, SINGLES, MIXUP = range(9)


def mix(x: UInt64[np.ndarray, "..."]) -> UInt64[np.ndarray, "..."]:
    """Bijection on 64 bits in which each input bit flips about half of the output bits.

    Source: the finalizer of SplitMix64 (Steele et al. 2014) with Stafford's constants "Mix13".
    """
    x = x ^ (x >> np.uint64(30))
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x


def hashed(seed: int, *keys: int | Int[np.ndarray, "..."]) -> UInt64[np.ndarray, "..."]:
    """64 bits for each combination of keys, which broadcast: h ← mix(h + key·GOLDEN) per key."""
    state = mix(np.array([seed & MASK], np.uint64) + GOLDEN)
    for key in keys:
        state = mix(state + np.asarray(key, np.int64).astype(np.uint64) * GOLDEN)
    return state


def unit(bits: UInt64[np.ndarray, "..."]) -> Float32[np.ndarray, "..."]:
    """Map bits to numbers uniform on the multiples of 2^-24 in [0, 1)."""
    return (bits >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)


def uniforms(
    seed: int,
    epoch: int | Int[np.ndarray, "n"],
    samples: Int[np.ndarray, "n"],
    num: int,
    stream: int = CROPS,
) -> Float32[np.ndarray, "n num"]:
    """Draws 0 to num-1 of each sample in its epoch, uniform in [0, 1)."""
    return unit(hashed(seed, stream, np.reshape(epoch, (-1, 1)), samples[:, None], np.arange(num)))


def derived_seed(seed: int, generation: int) -> int:
    """A seed of 31 bits for a generation of networks that are trained one after another; of the
    first, `seed` itself.
    """
    return seed if generation == 1 else int(hashed(seed, generation)[0] >> np.uint64(33))
