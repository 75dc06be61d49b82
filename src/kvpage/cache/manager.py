"""Block tables over the pools of all KV groups: match, allocate, fork, publish, rollback, free, check."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Sequence

from kvpage.api.kv import BlockCopy
from kvpage.cache.pool import BlockPool
from kvpage.cache.prefix import PrefixHasher, full_hit, window_hit
from kvpage.cache.tables import (
    BlockState,
    BlockTables,
    Group,
    GroupConfig,
    GroupState,
    TableEdits,
    check_config,
)


class BlockManager:
    """Gives blocks to sequences, shares them, and remembers what they hold.

    A table only grows at its end, and an entry of a full block never changes (but to 0, behind a window), so
    whoever mirrors the tables needs only the edits. Whoever writes into a block that others hold too first
    gets a copy of it. Every operation takes from all groups or from none.

    Args:
        block_size: tokens a block, the same in every group.
        groups: at least one.
        enable_prefix_caching: whether blocks are found again by what they hold.
        hash_key: key of the prefix hashes, 1 to 64 bytes; ``None`` = fresh entropy, so that digests mean
            nothing outside this manager.

    Attributes:
        queries, hits: tokens looked for in the prefix index, and found, over all admissions.
        copies, forks: blocks copied before a write; sequences split off.

    Raises:
        ConfigError: a size is out of range.
    """

    def __init__(
        self,
        *,
        block_size: int,
        groups: Sequence[GroupConfig],
        enable_prefix_caching: bool = True,
        hash_key: bytes | None = None,
    ) -> None:
        key = os.urandom(32) if hash_key is None else hash_key
        check_config(block_size, groups, key)
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self.queries = self.hits = self.copies = self.forks = 0
        self._groups = [Group(index, config) for index, config in enumerate(groups)]
        self._hasher = PrefixHasher(key, block_size)
        self._holders: dict[int, BlockTables] = {}  # by id(): tables that hold blocks
        self._copy_sources: list[tuple[int, int]] = []  # references passed on to the plan being built

    # ---- sizes ------------------------------------------------------------------------------------------

    @property
    def num_groups(self) -> int:
        return len(self._groups)

    @property
    def pools(self) -> list[BlockPool]:
        """The pool of each group; to read, not to change."""
        return [group.pool for group in self._groups]

    @property
    def usable_blocks(self) -> int:
        """Blocks of all groups together, null blocks not counted."""
        return sum(group.pool.usable for group in self._groups)

    @property
    def free_blocks(self) -> int:
        """Blocks that an allocation may take, over all groups: cached but unreferenced ones included."""
        return sum(group.pool.num_free for group in self._groups)

    @property
    def used_blocks(self) -> int:
        """Blocks that sequences hold, over all groups; a shared block counts once."""
        return sum(group.pool.num_used for group in self._groups)

    @property
    def cached_blocks(self) -> int:
        """Blocks that the prefix index knows, held or free, over all groups."""
        return sum(group.pool.num_cached for group in self._groups)

    def count_by_state(self) -> dict[str, int]:
        """Blocks of all groups: "used" by one table, "shared" by several, "cached" = held by none but in the prefix
        index, "free" = the rest. Looks at every block."""
        count = {"free": 0, "used": 0, "cached": 0, "shared": 0}
        for group in self._groups:
            pool = group.pool
            cached = [pool.references[block] for block in pool.index.values()].count(0)
            used = pool.references.count(1)
            count["cached"] += cached
            count["free"] += pool.num_free - cached
            count["used"] += used
            count["shared"] += pool.num_used - used
        return count

    @property
    def num_holders(self) -> int:
        """Sequences that hold blocks."""
        return len(self._holders)

    @property
    def capacity(self) -> int | None:
        """Tokens of KV that one sequence alone can ever have; ``None`` = no limit (only window groups)."""
        limits = [
            group.pool.usable * self.block_size for group in self._groups if self._chunk_limit(group) < 1
        ]
        return min(limits, default=None)

    @property
    def max_chunk(self) -> int | None:
        """Most tokens of one sequence a step may compute, so that window and chunk fit; ``None`` = any."""
        limits = [self._chunk_limit(group) for group in self._groups if self._chunk_limit(group) >= 1]
        return min(limits, default=None)

    def _chunk_limit(self, group: Group) -> int:
        # window - 1 + chunk tokens at any alignment touch at most (that - 2) // block_size + 2 blocks.
        if group.window is None:
            return 0
        return (group.pool.usable - 1) * self.block_size - group.window + 2

    # ---- what a sequence does ---------------------------------------------------------------------------

    def open(self, salt: str | None = None, adapter: str | None = None, variant: str = "") -> BlockTables:
        """Empty tables for a new sequence; prefixes are shared only among equal ``salt``, ``adapter`` and ``variant``
        (what else K and V of equal tokens depend on)."""
        roots = [
            self._hasher.root(salt, adapter, group.index, group.kind + variant) for group in self._groups
        ]
        count = len(self._groups)
        return BlockTables([[] for _ in range(count)], roots, [[] for _ in range(count)], [0] * count)

    def match(self, holder: BlockTables, token_ids: Sequence[int]) -> int:
        """Tokens of the longest cached prefix that serves every group; changes nothing.

        A multiple of the block size, and less than ``len(token_ids)``: the last token has to be computed.
        """
        if not self.enable_prefix_caching:
            return 0
        limit = (len(token_ids) - 1) // self.block_size
        for group in self._groups:
            self._hasher.extend(holder.roots[group.index], holder.digests[group.index], token_ids, limit)
        hit = limit
        for group in self._groups:
            if group.window is None:
                hit = full_hit(group.pool.index, holder.digests[group.index], hit)
        settled = False
        while hit and not settled:
            settled = True
            for group in self._groups:
                if group.window is not None:
                    found = window_hit(
                        group.pool.index, holder.digests[group.index], hit, group.reach, self.block_size
                    )
                    settled = settled and found == hit
                    hit = found
        return hit * self.block_size

    def admit(
        self,
        holder: BlockTables,
        slot: int,
        known: int,
        hit: int,
        count: int,
        edits: TableEdits,
        spare: int = 0,
    ) -> bool:
        """Take the cached prefix of ``hit`` tokens (from ``match``) and room for the next ``count`` tokens.

        ``False``, with nothing taken, if the pools have too little; full groups, too little for all ``known``
        tokens of the sequence and ``spare`` blocks besides: who is let in too early is soon preempted.
        """
        size = self.block_size
        blocks = hit // size
        hits: list[list[int]] = []
        for group in self._groups:
            pool = group.pool
            first = 0 if group.window is None else max(0, hit - group.reach) // size
            found = [pool.index[digest] for digest in holder.digests[group.index][first:blocks]]
            needed = -(-(hit + count) // size) - blocks
            if group.window is None:
                needed = -(-known // size) - blocks + spare
            claimed = sum(pool.references[block] == 0 for block in found)
            if needed + claimed > pool.num_free:
                return False
            hits.append(found)
        for group, found in zip(self._groups, hits, strict=True):
            first = blocks - len(found)
            for block in found:
                group.pool.share(block)
            holder.tables[group.index] = [0] * first + found
            holder.first[group.index] = first
            _write(edits, slot, group.index, 0, holder.tables[group.index])
        self._holders[id(holder)] = holder
        holder.published = blocks
        self.queries += known
        self.hits += hit
        return self.allocate(holder, slot, hit, count, edits)

    def allocate(self, holder: BlockTables, slot: int, start: int, count: int, edits: TableEdits) -> bool:
        """Make positions ``start`` .. ``start + count - 1`` writable; ``False``, with nothing changed, if the
        pools have too little.

        Blocks that lie wholly behind the window of ``start`` are given back first. If the block of ``start``
        is partly filled and held by others too, it is replaced by a copy.
        """
        size = self.block_size
        end = -(-(start + count) // size)
        for group in self._groups:
            pool = group.pool
            needed = end - len(holder.tables[group.index]) + self._is_shared(group, holder, start)
            if needed > pool.num_free and needed > pool.num_free + self._freed_behind(group, holder, start):
                return False
        for group in self._groups:
            pool, table, index = group.pool, holder.tables[group.index], group.index
            if group.window is not None:
                self._free_behind(group, holder, slot, start, edits)
            if self._is_shared(group, holder, start):
                number = start // size
                source, target = table[number], pool.take()
                # The reference to the source passes to the plan, so that it stays intact until it was copied.
                self._copy_sources.append((index, source))
                self.copies += 1
                table[number] = target
                edits.copies.append(BlockCopy(index, source, target))
                _write(edits, slot, index, number, (target,))
            filled = len(table)
            if filled < end:
                for _ in range(end - filled):
                    table.append(pool.take())
                _write(edits, slot, index, filled, table[filled:])
        return True

    def drop_copy_sources(self) -> None:
        """The plan is complete: nothing more is allocated before its copies are made."""
        for group, block in self._copy_sources:
            self._groups[group].pool.release(block)
        self._copy_sources.clear()

    def fork(self, holder: BlockTables, slot: int, edits: TableEdits) -> BlockTables:
        """New tables, for ``slot``, that hold the same blocks."""
        child = BlockTables(
            [list(table) for table in holder.tables],
            list(holder.roots),
            [list(digests) for digests in holder.digests],
            list(holder.first),
            holder.published,
        )
        for group in self._groups:
            table, share = child.tables[group.index], group.pool.share
            for block in table:
                if block:
                    share(block)
            _write(edits, slot, group.index, 0, table)
        self._holders[id(child)] = child
        self.forks += 1
        return child

    def publish(
        self,
        holder: BlockTables,
        token_ids: Sequence[int],
        length: int,
        journal: list[tuple[int, int]] | None = None,
    ) -> None:
        """The blocks that the first ``length`` tokens fill may be hit. New (group, block) go to ``journal``."""
        full = length // self.block_size
        if full <= holder.published or not self.enable_prefix_caching:
            return
        for group in self._groups:
            table, digests = holder.tables[group.index], holder.digests[group.index]
            self._hasher.extend(holder.roots[group.index], digests, token_ids, full)
            for number in range(holder.published, full):
                block = table[number]
                if block and group.pool.publish(block, digests[number]) and journal is not None:
                    journal.append((group.index, block))
        holder.published = full

    def withdraw(self, journal: Iterable[tuple[int, int]]) -> None:
        """These (group, block) were never filled as promised: nothing may hit them."""
        for group, block in journal:
            self._groups[group].pool.withdraw(block)

    def rollback(self, holder: BlockTables, length: int) -> None:
        """Only the first ``length`` tokens stay: the blocks after them are given back (rejected drafts)."""
        size = self.block_size
        keep, full = -(-length // size), length // size
        for group in self._groups:
            table, pool = holder.tables[group.index], group.pool
            for block in reversed(table[keep:]):
                if block:
                    pool.release(block)
            del table[keep:]
            if full < min(keep, holder.published) and pool.references[table[full]] == 1:
                pool.withdraw(table[full])  # about to be written again
            del holder.digests[group.index][full:]
            holder.first[group.index] = min(holder.first[group.index], len(table))
        holder.published = min(holder.published, full)

    def free(self, holder: BlockTables) -> None:
        """Give back everything; the digests are kept. The end of a sequence is reused before its beginning."""
        if self._holders.pop(id(holder), None) is None:
            return
        for group in self._groups:
            table, release = holder.tables[group.index], group.pool.release
            for block in reversed(table):
                if block:
                    release(block)
            holder.tables[group.index] = []
            holder.first[group.index] = 0
        holder.published = 0

    def reset_prefix_cache(self) -> bool:
        """Forget every cached block; ``False``, and nothing is forgotten, while sequences hold blocks.

        (A running sequence would go on to publish blocks that build on what was to be forgotten.)
        """
        if self.used_blocks:
            return False
        for group in self._groups:
            group.pool.forget()
        return True

    # ---- inspection -------------------------------------------------------------------------------------

    def snapshot(self) -> list[GroupState]:
        """The state of every block, as plain data."""
        return [
            GroupState(
                group.kind,
                group.window,
                [
                    BlockState(count, digest is not None)
                    for count, digest in zip(group.pool.references, group.pool.digests, strict=True)
                ],
            )
            for group in self._groups
        ]

    def check(self) -> None:
        """Verify every invariant of pools, index and tables (AssertionError says which one broke)."""
        assert not self._copy_sources, "copy sources are held outside of a plan"
        for group in self._groups:
            held: Counter[int] = Counter()
            for holder in self._holders.values():
                table, first = holder.tables[group.index], holder.first[group.index]
                assert len(table) == holder.num_blocks, "tables of one sequence differ in length"
                assert not any(table[:first]), f"blocks are held behind the window: {table[:first]}"
                assert all(table[first:]), f"holes in a block table: {table[first:]}"
                live = [block for block in table if block]
                assert len(set(live)) == len(live), f"a table names a block twice: {table}"
                assert first == 0 or group.window is not None, "a full group dropped blocks"
                assert holder.published <= len(table), "more blocks were published than the table has"
                held.update(live)
            group.pool.check(held)

    def _is_shared(self, group: Group, holder: BlockTables, start: int) -> bool:
        """Whether writing at ``start`` would change a block that other tables hold."""
        number, inside = divmod(start, self.block_size)
        if not inside:
            return False
        block = holder.tables[group.index][number]
        count = group.pool.references[block]
        return count > 1 and count - self._copy_sources.count((group.index, block)) > 1

    def _behind(self, group: Group, start: int) -> int:
        return 0 if group.window is None else max(0, start - group.reach) // self.block_size

    def _freed_behind(self, group: Group, holder: BlockTables, start: int) -> int:
        references = group.pool.references
        dropped = holder.tables[group.index][holder.first[group.index] : self._behind(group, start)]
        return sum(references[block] == 1 for block in dropped)

    def _free_behind(
        self, group: Group, holder: BlockTables, slot: int, start: int, edits: TableEdits
    ) -> None:
        first, behind = holder.first[group.index], self._behind(group, start)
        if behind <= first:
            return
        table = holder.tables[group.index]
        for number in range(behind - 1, first - 1, -1):
            group.pool.release(table[number])
            table[number] = 0
        holder.first[group.index] = behind
        _write(edits, slot, group.index, first, table[first:behind])


def _write(edits: TableEdits, slot: int, group: int, index: int, blocks: Sequence[int]) -> None:
    count = len(blocks)
    edits.table_slots.extend((slot,) * count)
    edits.table_groups.extend((group,) * count)
    edits.table_indices.extend(range(index, index + count))
    edits.table_blocks.extend(blocks)
