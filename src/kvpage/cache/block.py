"""The free list: blocks that nobody holds, the next one to be reused first."""

from __future__ import annotations

from collections.abc import Iterator

ABSENT = -1
"""Link of a block that is not in the list."""


class FreeList:
    """A doubly linked list threaded through two lists of integers: every operation is O(1), none allocates.

    Block 0 is the null block, which is never free, so its links serve as the anchor of the ring::

        0 -> first to be reused -> ... -> last to be reused -> 0

    Args:
        num_blocks: blocks with the null block; blocks 1 .. num_blocks - 1 start in the list, in this order.
    """

    __slots__ = ("_following", "_length", "_preceding")

    def __init__(self, num_blocks: int) -> None:
        self._following: list[int] = [*range(1, num_blocks), 0]
        self._preceding: list[int] = [num_blocks - 1, *range(num_blocks - 1)]
        self._length = num_blocks - 1

    def __len__(self) -> int:
        return self._length

    def __contains__(self, block: int) -> bool:
        return block != 0 and self._following[block] != ABSENT

    def __iter__(self) -> Iterator[int]:
        block = self._following[0]
        while block:
            yield block
            block = self._following[block]

    def pop(self) -> int:
        """Take the first block out. The list must not be empty."""
        following = self._following
        block = following[0]
        after = following[block]
        following[0] = after
        self._preceding[after] = 0
        following[block] = ABSENT
        self._length -= 1
        return block

    def remove(self, block: int) -> None:
        """Take ``block`` out, wherever it is. It must be in the list."""
        following, preceding = self._following, self._preceding
        before, after = preceding[block], following[block]
        following[before] = after
        preceding[after] = before
        following[block] = ABSENT
        self._length -= 1

    def append(self, block: int) -> None:
        """Put ``block`` last. It must not be in the list."""
        following, preceding = self._following, self._preceding
        before = preceding[0]
        following[before] = block
        preceding[block] = before
        following[block] = 0
        preceding[0] = block
        self._length += 1

    def prepend(self, block: int) -> None:
        """Put ``block`` first. It must not be in the list."""
        following, preceding = self._following, self._preceding
        after = following[0]
        following[0] = block
        preceding[block] = 0
        following[block] = after
        preceding[after] = block
        self._length += 1

    def check(self) -> None:
        """Both directions name the same blocks, as many as the length says, and no other block is linked."""
        forward: list[int] = []
        block = self._following[0]
        while block and len(forward) <= self._length:
            forward.append(block)
            block = self._following[block]
        backward: list[int] = []
        block = self._preceding[0]
        while block and len(backward) <= self._length:
            backward.append(block)
            block = self._preceding[block]
        assert forward == backward[::-1], f"free list reads {forward} forward and {backward} backward"
        assert len(forward) == self._length, f"free list holds {len(forward)} blocks and says {self._length}"
        linked = [block for block in range(1, len(self._following)) if self._following[block] != ABSENT]
        assert sorted(forward) == linked, f"blocks {linked} are linked, the free list holds {sorted(forward)}"
