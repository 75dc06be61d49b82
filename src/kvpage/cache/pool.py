"""A pool of blocks of one KV group: who holds them, what they cache, which one is reused next."""

from __future__ import annotations

from collections.abc import Mapping

from kvpage.cache.block import FreeList


class BlockPool:
    """Reference counts, the prefix index and the free list of one KV group, as a struct of arrays.

    A block is *held* (``references`` > 0) or *free*. A free block may still be *cached*: its digest stays in
    the index until the block is taken for something else (least recently freed first), so an allocation may
    take every free block.

    Args:
        num_blocks: blocks of the group's KV tensors. Block 0 is the null block: never given out, so
            ``usable`` is one less.

    Attributes:
        references: block -> number of block tables that hold it.
        digests: block -> the digest under which the index knows it, or ``None``.
        index: digest -> block; the inverse of ``digests``.
    """

    __slots__ = ("digests", "free", "index", "references", "usable")

    def __init__(self, num_blocks: int) -> None:
        self.usable = num_blocks - 1
        self.references = [0] * num_blocks
        self.digests: list[bytes | None] = [None] * num_blocks
        self.index: dict[bytes, int] = {}
        self.free = FreeList(num_blocks)

    @property
    def num_free(self) -> int:
        """Blocks an allocation may take, cached ones included."""
        return len(self.free)

    @property
    def num_used(self) -> int:
        """Blocks that at least one table holds."""
        return self.usable - len(self.free)

    @property
    def num_cached(self) -> int:
        """Blocks the index knows, held or free."""
        return len(self.index)

    def take(self) -> int:
        """Give out the free block that was used longest ago and forget what it cached. There must be one."""
        block = self.free.pop()
        digest = self.digests[block]
        if digest is not None:
            del self.index[digest]
            self.digests[block] = None
        self.references[block] = 1
        return block

    def share(self, block: int) -> None:
        """One more table holds ``block``, which is held already or free and cached."""
        if self.references[block] == 0:
            self.free.remove(block)
        self.references[block] += 1

    def release(self, block: int) -> None:
        """One table fewer holds ``block``. Of free blocks, those that cache nothing are reused first."""
        left = self.references[block] - 1
        self.references[block] = left
        if left == 0:
            if self.digests[block] is None:
                self.free.prepend(block)
            else:
                self.free.append(block)

    def publish(self, block: int, digest: bytes) -> bool:
        """Let ``block`` be hit under ``digest``; ``False`` if another block already is (it stays)."""
        if digest in self.index:
            return False
        self.index[digest] = block
        self.digests[block] = digest
        return True

    def withdraw(self, block: int) -> None:
        """``block`` is not to be hit any more."""
        digest = self.digests[block]
        if digest is None:
            return
        del self.index[digest]
        self.digests[block] = None
        if self.references[block] == 0:
            self.free.remove(block)
            self.free.prepend(block)

    def forget(self) -> None:
        """Withdraw every block."""
        for block in list(self.index.values()):
            self.withdraw(block)

    def check(self, held: Mapping[int, int]) -> None:
        """Every invariant; ``held`` counts, for each block, the tables that name it."""
        self.free.check()
        assert (self.references[0], self.digests[0]) == (0, None), "the null block is in use"
        for block in range(1, self.usable + 1):
            count = self.references[block]
            assert count == held.get(block, 0), (
                f"block {block} counts {count} references, {held.get(block, 0)} tables hold it"
            )
            assert (count == 0) == (block in self.free), (
                f"block {block} has {count} references and is {'' if block in self.free else 'not '}free"
            )
            digest = self.digests[block]
            assert digest is None or self.index.get(digest) == block, f"block {block} is not under its digest"
        known = sum(digest is not None for digest in self.digests)
        assert known == len(self.index), f"{known} blocks have a digest, the index holds {len(self.index)}"
