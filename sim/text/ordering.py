"""Which row an index leads to: pure functions of (key, index), so that nothing is saved, missed or drawn twice.

Sources are mixed in blocks of `BLOCK` draws, each of which takes from a source what its weight asks for. A source is
gone through epoch by epoch: every row once, in an order that belongs to the key and the epoch.
"""

from collections.abc import Sequence
from functools import lru_cache
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

BLOCK = 1000  # weights are met to within a thousandth

Indices = NDArray[np.int64]


def digest(*parts: object) -> int:
    """A 64-bit number that belongs to these parts, the same in every process and version."""
    text = "\0".join(map(str, parts))
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little")


def permutation(key: int, size: int) -> Indices:
    """An order of `range(size)` that belongs to the key; all orders are equally likely.

    Sorted by SplitMix64's finalizer of each index (written here, as numpy's streams may change between versions).
    """
    draws = np.arange(1, size + 1, dtype=np.uint64)
    for addend in (np.uint64(0x9E3779B97F4A7C15), np.uint64(key)):
        draws = draws * np.uint64(0x9E3779B97F4A7C15) + addend
        draws = (draws ^ (draws >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        draws = (draws ^ (draws >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        draws ^= draws >> np.uint64(31)
    return np.argsort(draws, kind="stable")


class Epochs:
    """The rows of one source in the order in which they are played.

    size: rows
    name: of the source; two sources of one size have orders of their own
    shuffle: a new order in every epoch; False keeps the order of the file
    pass_rates: [size] measured before; with levels > 1 an epoch begins with the easiest rows (highest rate)
    levels: parts of an epoch, of equal size, from easy to hard; shuffled within each
    """

    def __init__(
        self,
        size: int,
        *,
        name: str,
        shuffle: bool = True,
        pass_rates: Sequence[float] = (),
        levels: int = 1,
    ) -> None:
        self._size = size
        self._name = name
        self._shuffle = shuffle
        self._level = np.zeros(size, dtype=np.int64)
        if levels > 1:
            rank = np.empty(size, dtype=np.int64)
            rank[np.argsort(-np.asarray(pass_rates), kind="stable")] = np.arange(size)
            self._level = rank * levels // size
        # Two, because groups of an epoch's end and of the next one's begin are played side by side.
        self._order = lru_cache(maxsize=2)(self._make_order)

    def row(self, key: int, position: int) -> int:
        """The row at a position that counts on from epoch to epoch."""
        epoch, place = divmod(position, self._size)
        return int(self._order(key, epoch)[place])

    def _make_order(self, key: int, epoch: int) -> Indices:
        order = np.arange(self._size)
        if self._shuffle:
            order = permutation(digest("epoch", key, self._name, epoch), self._size)
        return order[np.argsort(self._level[order], kind="stable")]


class Mixture:
    """Which source an index draws from, and how many draws of that source came before it.

    weights: of the sources; only their proportions count. ValueError: one is too small to be met.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        shares = [weight / sum(weights) * BLOCK for weight in weights]
        counts = [int(share) for share in shares]
        largest_rest_first = sorted(range(len(shares)), key=lambda i: counts[i] - shares[i])
        for source in largest_rest_first[: BLOCK - sum(counts)]:
            counts[source] += 1
        if 0 in counts:
            raise ValueError(
                f"weight = {weights[counts.index(0)]:g} is less than a thousandth of all weights "
                "together: raise it, or leave the source out"
            )
        self._counts = counts
        # Evenly interleaved: the k-th draw of a source stands where its share of the block says.
        places = np.concatenate([(np.arange(count) + 0.5) / count for count in counts])
        sources = np.repeat(np.arange(len(counts)), counts)
        self._sources = sources[np.argsort(places, kind="stable")]
        self._before = np.empty(BLOCK, dtype=np.int64)
        for source in range(len(counts)):
            mine = self._sources == source
            self._before[mine] = np.arange(counts[source])

    def locate(self, index: int) -> tuple[int, int]:
        """(source, position in the source) of a draw."""
        block, place = divmod(index, BLOCK)
        source = int(self._sources[place])
        return source, block * self._counts[source] + int(self._before[place])
