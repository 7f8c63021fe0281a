"""Keyed random numbers: every draw is a pure function of its key, so no actor's random state is saved or missed.

Keys are 64-bit integers made by folding (job seed, purpose, group, sample, turn, …) with SplitMix64's finalizer
(Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators"); a draw adds the token position.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

MASK64 = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15
MIX1 = 0xBF58476D1CE4E5B9
MIX2 = 0x94D049BB133111EB


def mix(value: int) -> int:
    """SplitMix64's finalizer: a bijection of 64-bit integers whose output bits all depend on all input bits."""
    value &= MASK64
    value = ((value ^ (value >> 30)) * MIX1) & MASK64
    value = ((value ^ (value >> 27)) * MIX2) & MASK64
    return value ^ (value >> 31)


def fold(*parts: int) -> int:
    """Fold integers into one 64-bit key; the order matters."""
    key = 0
    for part in parts:
        key = mix((key + GOLDEN) ^ mix(part + GOLDEN))
    return key


def uniform(key: int, position: int) -> float:
    """The uniform draw in [0, 1) that belongs to (key, position), with 53 random bits."""
    return (mix(key + (position + 1) * GOLDEN) >> 11) * 2.0**-53


def uniform_table(keys: Sequence[int], positions: int) -> NDArray[np.float64]:
    """`uniform` of every key at positions 0 to positions - 1, bit for bit: float64 [keys, positions]."""
    mixed = np.array([key & MASK64 for key in keys], dtype=np.uint64)[:, None]
    mixed = mixed + np.arange(1, positions + 1, dtype=np.uint64) * np.uint64(GOLDEN)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(MIX1)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(MIX2)
    mixed = mixed ^ (mixed >> np.uint64(31))
    return (mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53
