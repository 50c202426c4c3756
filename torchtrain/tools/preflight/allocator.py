"""What PyTorch's caching allocator reserves for tensors that come and go, one after the other.

Sources: c10/cuda/CUDACachingAllocator.cpp, and the notes on expandable segments, which the launcher
turns on, in https://docs.pytorch.org/docs/stable/notes/cuda.html.
"""

from bisect import bisect_left, insort
from collections.abc import Iterable
from typing import NamedTuple

GRAIN = 512
"""Sizes are rounded up to multiples of so many bytes."""
SMALL = 2**20
"""Tensors of up to so many bytes have a segment of their own, and break up no large block."""


class Change(NamedTuple):
    """A tensor that comes or goes."""

    tensor: int
    """Its number."""
    size: int
    """Its bytes; 0 where it goes."""


class Block(NamedTuple):
    """A piece of a segment."""

    start: int
    end: int
    """The first byte after it."""


class Segment:
    """An expandable segment, as the large tensors of one stream fill it. It has no memory.

    A tensor gets the smallest free block that holds it, and what is left of that stays free. Where
    none does, the segment grows, by what its last block lacks if that is free. Free neighbors join.
    """

    def __init__(self) -> None:
        self.size = 0
        """Bytes that are reserved, in use or free; they never become fewer."""
        self._by_size: list[tuple[int, int]] = []
        """The size and the start of each free block, in order."""
        self._ends: dict[int, int] = {}
        """The ends of the free blocks, by their starts."""
        self._starts: dict[int, int] = {}
        """And their starts, by their ends."""

    def take(self, size: int) -> Block:
        """Return a block for so many bytes."""
        if size <= SMALL:
            return Block(0, 0)
        size = -(-size // GRAIN) * GRAIN
        smallest = bisect_left(self._by_size, (size, 0))
        if smallest < len(self._by_size):
            start = self._by_size[smallest][1]
            end = self._ends[start]
            self._remove(start, end)
            self._add(start + size, end)
        else:
            start = self._starts.get(self.size, self.size)
            self._remove(start, self.size)
            self.size = start + size
        return Block(start, start + size)

    def free(self, block: Block) -> None:
        """Free a block that was taken."""
        start, end = block
        if start == end:
            return
        first = self._starts.get(start, start)
        last = self._ends.get(end, end)
        self._remove(first, start)
        self._remove(end, last)
        self._add(first, last)

    def replay(self, changes: Iterable[Change], blocks: dict[int, Block]) -> None:
        """Let tensors come and go.

        Args:
            changes: in order.
            blocks: of those that are there, by their numbers; is brought up to date.
        """
        for tensor, size in changes:
            if size > 0:
                blocks[tensor] = self.take(size)
            elif tensor in blocks:
                self.free(blocks.pop(tensor))

    def _add(self, start: int, end: int) -> None:
        if start < end:
            insort(self._by_size, (end - start, start))
            self._ends[start] = end
            self._starts[end] = start

    def _remove(self, start: int, end: int) -> None:
        if start < end:
            del self._by_size[bisect_left(self._by_size, (end - start, start))]
            del self._ends[start], self._starts[end]
