"""The block map: what every KV block holds at one moment, and for whom."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Literal, TypeAlias

from kvpage.inspect.block_map_svg import block_map_svg
from kvpage.inspect.block_map_text import block_map_text
from kvpage.sched.scheduler import Scheduler
from kvpage.sched.snapshot import SchedulerSnapshot

BlockUse: TypeAlias = Literal["free", "cached", "used", "shared"]
"""free: nothing of worth. cached: no sequence holds it, the prefix index may still hand it out. used: one
sequence holds it. shared: several do. ``cached_blocks`` of an engine's ``stats()`` counts used and shared blocks
that the prefix index knows, too: ``BlockView.cached``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockOwner:
    """A sequence that holds a block: choice ``choice`` of a request, as block ``index`` of its table."""

    request_id: str
    choice: int
    index: int


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockView:
    """One block. ``filled``: tokens whose K and V are in it, as far as its owners or the prefix index know."""

    number: int
    references: int
    cached: bool
    filled: int
    owners: tuple[BlockOwner, ...]

    @property
    def state(self) -> BlockUse:
        if self.references == 0:
            return "cached" if self.cached else "free"
        return "shared" if self.references > 1 else "used"


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupView:
    """One KV group's pool, without the null block."""

    index: int
    kind: str
    window: int | None
    blocks: tuple[BlockView, ...]

    def count(self, state: BlockUse) -> int:
        """Blocks in that state."""
        return sum(block.state == state for block in self.blocks)


@dataclass(frozen=True, kw_only=True, slots=True)
class SequenceView:
    """One live choice. ``slot`` is -1 while it waits; ``tables[g]``: its blocks in group g, 0 = freed behind a
    window."""

    request_id: str
    choice: int
    state: Literal["running", "waiting"]
    slot: int
    known: int
    computed: int
    tables: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockMap:
    """A consistent picture of KV memory between two steps."""

    block_size: int
    groups: tuple[GroupView, ...]
    sequences: tuple[SequenceView, ...]

    def to_text(self, width: int = 64) -> str:
        """One character a block, ``width`` blocks a line; a legend; a line a sequence. Plain ASCII."""
        return block_map_text(self, width)

    def to_svg(self, columns: int = 64) -> str:
        """A self-contained picture with a legend; each block's tooltip names its owners."""
        return block_map_svg(self, columns)


def take_snapshot(scheduler: Scheduler) -> BlockMap:
    """The block map of a scheduler's block manager. To be called by the thread that steps it."""
    return map_blocks(scheduler.snapshot())


def map_blocks(state: SchedulerSnapshot) -> BlockMap:
    """The block map of what a scheduler said; any thread may work it out."""
    size = state.block_size
    live = [*state.running, *state.waiting]
    owners: list[dict[int, list[BlockOwner]]] = [{} for _ in state.groups]
    filled: list[Counter[int]] = [Counter() for _ in state.groups]
    for sequence in live:
        for group, table in enumerate(sequence.tables):
            for index, number in enumerate(table):
                if number:
                    owner = BlockOwner(request_id=sequence.request_id, choice=sequence.index, index=index)
                    owners[group].setdefault(number, []).append(owner)
                    tokens = min(size, max(0, sequence.computed - index * size))
                    filled[group][number] = max(filled[group][number], tokens)
    groups = []
    for index, pool in enumerate(state.groups):
        views = (
            BlockView(
                number=number,
                references=block.references,
                cached=block.cached,
                filled=size if block.cached else filled[index][number],
                owners=tuple(owners[index].get(number, ())),
            )
            for number, block in enumerate(pool.blocks)
            if number
        )
        groups.append(GroupView(index=index, kind=pool.kind, window=pool.window, blocks=tuple(views)))
    sequences = tuple(
        SequenceView(
            request_id=sequence.request_id,
            choice=sequence.index,
            state="waiting" if sequence.slot < 0 else "running",
            slot=sequence.slot,
            known=sequence.known,
            computed=sequence.computed,
            tables=tuple(tuple(table) for table in sequence.tables),
        )
        for sequence in live
    )
    return BlockMap(block_size=size, groups=tuple(groups), sequences=sequences)
