"""Contiguous KV allocators: each request gets one run of slots when it starts and keeps it until it ends."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from simulation.workloads import MAX_MODEL_LEN, Job, Workload


def power_of_two(size: int) -> int:
    """The least power of two that is not below ``size``."""
    return 1 << (size - 1).bit_length()


class Allocator(Protocol):
    """Runs of slots out of a fixed pool."""

    def take(self, size: int) -> tuple[int, int] | None:
        """(start, slots taken, ``size`` or more), or ``None`` where no run is long enough."""

    def give_back(self, start: int, taken: int) -> None:
        """The run is free again."""


class FirstFit:
    """The first gap that is long enough; neighbouring gaps are merged."""

    def __init__(self, slots: int) -> None:
        self.gaps: list[tuple[int, int]] = [(0, slots)]

    def take(self, size: int) -> tuple[int, int] | None:
        for index, (start, length) in enumerate(self.gaps):
            if length >= size:
                left = (start + size, length - size)
                self.gaps[index : index + 1] = [left] if left[1] else []
                return start, size
        return None

    def give_back(self, start: int, taken: int) -> None:
        gaps: list[tuple[int, int]] = []
        for gap_start, length in sorted([*self.gaps, (start, taken)]):
            if gaps and sum(gaps[-1]) == gap_start:
                gaps[-1] = (gaps[-1][0], gaps[-1][1] + length)
            else:
                gaps.append((gap_start, length))
        self.gaps = gaps


class Buddy:
    """Runs of 2^k slots, split in halves and merged again with their other half; what Orca is taken to use.

    A pool that is no power of two begins as one run for each binary digit of its size.
    """

    def __init__(self, slots: int) -> None:
        self.free: dict[int, set[int]] = {1 << order: set() for order in range(slots.bit_length())}
        start = 0
        for size in sorted(self.free, reverse=True):
            if slots & size:
                self.free[size].add(start)
                start += size
        self._whole = {(first, size) for size, starts in self.free.items() for first in starts}

    def take(self, size: int) -> tuple[int, int] | None:
        wanted = power_of_two(size)
        found = min((have for have, starts in self.free.items() if have >= wanted and starts), default=None)
        if found is None:
            return None
        start = min(self.free[found])
        self.free[found].remove(start)
        while found > wanted:
            found //= 2
            self.free[found].add(start + found)
        return start, wanted

    def give_back(self, start: int, taken: int) -> None:
        while (start, taken) not in self._whole:
            base = max(first for first, size in self._whole if first <= start)
            other = base + ((start - base) ^ taken)
            if other not in self.free[taken]:
                break
            self.free[taken].remove(other)
            start, taken = min(start, other), 2 * taken
        self.free[taken].add(start)


@dataclass(frozen=True, slots=True)
class Policy:
    """How many slots a request reserves when it starts, and from which allocator."""

    name: str
    reserve: Callable[[Job, Workload], int]
    allocator: Callable[[int], Allocator]


def reserve_longest(length: int) -> Policy:
    """Every request reserves ``length`` slots."""
    return Policy(f"max_model_len {length}, buddy", lambda job, workload: length, Buddy)


RESERVE_MAX = reserve_longest(MAX_MODEL_LEN)
RESERVE_POW2 = Policy(
    "prompt + 2^k, buddy", lambda job, workload: job.prompt + power_of_two(job.output), Buddy
)
RESERVE_EXACT = Policy("exact length, buddy", lambda job, workload: job.slots, Buddy)
RESERVE_ASKED = Policy(
    "prompt + max_tokens, first fit", lambda job, workload: job.prompt + workload.max_tokens - 1, FirstFit
)
RESERVE_EXACT_FIT = Policy("exact length, first fit", lambda job, workload: job.slots, FirstFit)

ORCA = (RESERVE_MAX, RESERVE_POW2, RESERVE_EXACT)
"""Orca (Max), (Pow2) and (Oracle) of arXiv:2309.06180, section 6.1. The last two know the output's length."""
CONTIGUOUS = (*ORCA, RESERVE_ASKED, RESERVE_EXACT_FIT)
