"""What holds which blocks at one moment, as plain data for inspection."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

from kvpage.cache.tables import GroupState
from kvpage.sched.sequence import Sequence


@dataclass(frozen=True, slots=True)
class SequenceState:
    """One sequence.

    Attributes:
        request_id, index: which choice of which request.
        slot: -1 while it waits.
        known, computed: tokens.
        tables: a KV group -> block numbers, 0 = behind the window; empty while it waits.
    """

    request_id: str
    index: int
    slot: int
    known: int
    computed: int
    tables: list[list[int]]


@dataclass(frozen=True, slots=True)
class SchedulerSnapshot:
    """Every block of every KV group, and every sequence, running and waiting ones in policy order."""

    block_size: int
    groups: list[GroupState]
    running: list[SequenceState]
    waiting: list[SequenceState]


def sequence_states(sequences: SequenceOf[Sequence]) -> list[SequenceState]:
    """Copies that do not change any more."""
    return [
        SequenceState(
            s.request.request_id,
            s.index,
            s.slot,
            len(s.token_ids),
            s.computed,
            [list(table) for table in s.blocks.tables],
        )
        for s in sequences
    ]
