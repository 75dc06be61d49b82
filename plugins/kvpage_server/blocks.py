"""What a viewer of KV memory is shown: one look at the engine serves all viewers, packed small."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

from kvpage import AsyncEngine

if TYPE_CHECKING:
    from kvpage.inspect.snapshot import BlockMap, BlockView, GroupView, SequenceView

COUNTS_AGE = 0.2
"""Seconds that one look stands for, however many ask."""
MAP_AGE_PER_BLOCK = 60e-6
"""Seconds that a block map stands for, a block. Taking one costs the engine's thread some 3 us a block, so that
watching takes 5% of it at most; below 3,300 blocks ``COUNTS_AGE`` is the longer one."""
MOST_WAITING = 64
"""Waiting sequences without blocks that are listed; the others are counted only."""
LETTERS = {"free": "f", "cached": "c", "used": "u", "shared": "s"}


@dataclass(frozen=True, slots=True)
class Look:
    """One look: ``body`` is the answer's JSON; ``taken`` and ``map_taken`` are ``time.monotonic()``."""

    taken: float
    map_taken: float
    block_map: BlockMap
    packed_map: dict[str, Any]
    body: bytes


class BlockWatch:
    """Looks at one engine for all who ask. Belongs to one event loop."""

    def __init__(self, engine: AsyncEngine, facts: dict[str, Any]) -> None:
        """``facts`` stand in every answer."""
        self._engine, self._facts = engine, facts
        self._task: asyncio.Task[Look] | None = None
        self._latest: Look | None = None
        self._drawn: tuple[BlockMap, str] | None = None

    async def look(self) -> Look:
        """A look at most ``COUNTS_AGE`` old. Waits for the running step to end, outside the event loop.

        Raises:
            EngineDeadError: the engine is closed or a step failed.
        """
        if self._task is None or (self._task.done() and not self._is_fresh(self._task)):
            self._task = asyncio.create_task(asyncio.to_thread(self._take))
        # A viewer that goes away must not end what others wait for.
        return await asyncio.shield(self._task)

    async def svg(self) -> str:
        """The block map as a picture."""
        block_map = (await self.look()).block_map
        if self._drawn is None or self._drawn[0] is not block_map:
            self._drawn = (block_map, await asyncio.to_thread(block_map.to_svg))
        return self._drawn[1]

    @staticmethod
    def _is_fresh(task: asyncio.Task[Look]) -> bool:
        if task.cancelled() or task.exception() is not None:
            return False
        return time.monotonic() - task.result().taken < COUNTS_AGE

    def _take(self) -> Look:
        stats, before = self._engine.stats(), self._latest
        now = time.monotonic()
        if before is None or now - before.map_taken >= MAP_AGE_PER_BLOCK * stats.total_blocks:
            block_map = self._engine.inspect()
            map_taken, packed = now, pack_map(block_map)
        else:
            block_map, map_taken, packed = before.block_map, before.map_taken, before.packed_map
        counts = {
            "running": stats.running,
            "waiting": stats.waiting,
            "prompt_tokens": stats.prompt_tokens,
            "generated_tokens": stats.generated_tokens,
            "finished_requests": stats.finished_requests,
            "preemptions": stats.preemptions,
            "prefix_queries": stats.prefix_queries,
            "prefix_hits": stats.prefix_hits,
            "kv_usage": round(stats.kv_usage, 6),
        }
        answer = {
            **self._facts,
            "time": round(now, 4),
            "map_time": round(map_taken, 4),
            "engine": counts,
            **packed,
        }
        body = json.dumps(answer, separators=(",", ":"), ensure_ascii=False).encode("utf-8", "replace")
        self._latest = Look(now, map_taken, block_map, packed, body)
        return self._latest


def pack_map(block_map: BlockMap) -> dict[str, Any]:
    """The block map for JSON, runs of equal blocks in one piece."""
    holding: list[SequenceView] = []
    waiting: list[SequenceView] = []
    for sequence in block_map.sequences:
        holds = sequence.state == "running" or any(any(table) for table in sequence.tables)
        (holding if holds else waiting).append(sequence)
    return {
        "block_size": block_map.block_size,
        "groups": [_pack_group(group, block_map.block_size) for group in block_map.groups],
        "sequences": [_pack_sequence(sequence) for sequence in [*holding, *waiting[:MOST_WAITING]]],
    }


def _pack_group(group: GroupView, block_size: int) -> dict[str, Any]:
    held = [block for block in group.blocks if block.references]
    return {
        "index": group.index,
        "kind": group.kind,
        "window": group.window,
        "total": len(group.blocks),
        **{state: group.count(state) for state in ("free", "used", "shared", "cached")},
        "states": runs(map(_letter, group.blocks)),
        "references": {str(block.number): block.references for block in held if block.references > 1},
        "filled": {str(block.number): block.filled for block in held if block.filled != block_size},
    }


def _letter(block: BlockView) -> str:
    letter = LETTERS[block.state]
    return letter.upper() if block.cached and block.references else letter


def _pack_sequence(sequence: SequenceView) -> dict[str, Any]:
    return {
        "request_id": sequence.request_id,
        "choice": sequence.choice,
        "state": sequence.state,
        "known": sequence.known,
        "computed": sequence.computed,
        "blocks": [ranges(table) for table in sequence.tables],
    }


def runs(letters: Iterable[str]) -> str:
    """ "uuusff" as "3u1s2f"."""
    return "".join(f"{sum(1 for _ in run)}{letter}" for letter, run in groupby(letters))


def ranges(numbers: Iterable[int]) -> str:
    """1 2 3 7 as "1-3 7"; 0, which stands for no block, is left out."""
    found: list[list[int]] = []
    for number in numbers:
        if not number:
            continue
        if found and found[-1][1] == number - 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return " ".join(str(first) if first == last else f"{first}-{last}" for first, last in found)
