"""Which bytes of a segment are free. Plain bookkeeping, no memory.

First fit at the lowest offset: blocks that come and go stay in the pages that were touched before, and a fresh page
costs several times the copy into it.
"""

import bisect

ALIGNMENT = 4096  # bytes; a page, so that neighbours share none


def aligned(nbytes: int) -> int:
    """`nbytes` rounded up to what an allocation takes."""
    return max(ALIGNMENT, -(-nbytes // ALIGNMENT) * ALIGNMENT)


class FreeList:
    """The free blocks of one segment of `size_bytes`, merged with their neighbours when they return."""

    def __init__(self, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        self._offsets = [0]
        self._sizes = {0: size_bytes}

    @property
    def free_bytes(self) -> int:
        """Bytes in all free blocks."""
        return sum(self._sizes.values())

    @property
    def empty(self) -> bool:
        """Nothing is allocated."""
        return self.free_bytes == self.size_bytes

    def allocate(self, nbytes: int) -> int | None:
        """The offset of a block of `aligned(nbytes)`, or None where no free block is so large."""
        wanted = aligned(nbytes)
        for index, offset in enumerate(self._offsets):
            size = self._sizes[offset]
            if size < wanted:
                continue
            del self._sizes[offset]
            if size == wanted:
                del self._offsets[index]
            else:
                self._offsets[index] = offset + wanted
                self._sizes[offset + wanted] = size - wanted
            return offset
        return None

    def free(self, offset: int, nbytes: int) -> None:
        """Give back a block that `allocate` gave out."""
        size = aligned(nbytes)
        index = bisect.bisect(self._offsets, offset)
        if index < len(self._offsets) and self._offsets[index] == offset + size:
            size += self._sizes.pop(self._offsets.pop(index))
        before = self._offsets[index - 1] if index else None
        if before is not None and before + self._sizes[before] == offset:
            self._sizes[before] += size
        else:
            self._offsets.insert(index, offset)
            self._sizes[offset] = size
