"""Who holds which part of an arena: its producer, receivers it was lent to, or both.

What the arenas of shared memory and of device memory have in common; where the bytes lie is theirs.
"""

import threading
from collections import Counter, deque
from collections.abc import Sequence
from typing import Generic, TypeVar


class Block:
    """A part of an arena that is in use."""

    __slots__ = ("lent", "nbytes", "number", "offset", "owned")

    def __init__(self, number: int, offset: int, nbytes: int) -> None:
        self.number, self.offset, self.nbytes = number, offset, nbytes
        self.owned = True
        self.lent: Counter[str] = Counter()


B = TypeVar("B", bound=Block)


class LendingArena(Generic[B]):
    """Blocks by number. Any thread may take and return them; lending belongs to the loop."""

    def __init__(self) -> None:
        self._blocks: dict[int, B] = {}
        self._next_block = 0
        self._lock = threading.Lock()
        # What was collected ends here: a finalizer may run anywhere, also while the lock is held.
        self._disowned: deque[int] = deque()

    @property
    def num_blocks(self) -> int:
        """Blocks in use."""
        with self._lock:
            self._sweep()
            return len(self._blocks)

    def returned(self, peer: str, blocks: Sequence[int]) -> None:
        """A peer no longer looks at these blocks. Numbers it does not hold are passed over."""
        with self._lock:
            for number in blocks:
                block = self._blocks.get(number)
                if block is not None and block.lent[peer] > 0:
                    block.lent[peer] -= 1
                    self._free_unused(block)

    def peer_gone(self, peer: str) -> None:
        """A peer died: it holds nothing."""
        with self._lock:
            for block in [b for b in self._blocks.values() if b.lent[peer]]:
                del block.lent[peer]
                self._free_unused(block)

    def _release(self, block: B) -> None:
        """Make the space of a block free again. Called with the lock held."""
        raise NotImplementedError

    # Below: with the lock held.

    def _number(self) -> int:
        """That of the next block."""
        self._next_block += 1
        return self._next_block - 1

    def _sweep(self) -> None:
        while self._disowned:
            block = self._blocks[self._disowned.popleft()]
            block.owned = False
            self._free_unused(block)

    def _free_unused(self, block: B) -> None:
        if not block.owned and not any(block.lent.values()):
            del self._blocks[block.number]
            self._release(block)
