"""What an engine tells about itself: numbers on demand, a line in the log, events to listeners."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from kvpage.api.events import EventListener, StepStats

LOG_INTERVAL = 10.0
"""Seconds between two lines of ``disable_log_stats=False``."""


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Counts of one moment; those of the second line grow for as long as the engine lives.

    Attributes:
        running, waiting: sequences with and without a slot.
        free_blocks: what an allocation may take, cached but unreferenced blocks included.
        used_blocks: blocks that a sequence refers to. cached_blocks: blocks in the prefix index.
        total_blocks: free + used, over all KV groups.
        preemptions, forks, copies: sequences that lost their blocks; split off for n > 1; blocks copied on write.
        prefix_queries, prefix_hits: prompt tokens looked up in the prefix cache, and found there.
        steps, prompt_tokens, generated_tokens: done so far (prompt tokens of accepted requests).
        finished_requests: ended requests, whatever the reason.
    """

    running: int
    waiting: int
    free_blocks: int
    used_blocks: int
    cached_blocks: int
    total_blocks: int
    preemptions: int
    forks: int
    copies: int
    prefix_queries: int
    prefix_hits: int
    steps: int
    prompt_tokens: int
    generated_tokens: int
    finished_requests: int

    @property
    def kv_usage(self) -> float:
        """Share of the KV blocks in use, 0 .. 1."""
        return self.used_blocks / self.total_blocks if self.total_blocks else 0.0


EVENTS = ("admitted", "scheduled", "preempted", "token", "finished", "completed", "step")


class Listeners:
    """Calls event listeners, each for what it overrides; one that raises is logged and dropped."""

    def __init__(self, listeners: Mapping[str, EventListener] | None = None) -> None:
        """``listeners`` by their names, which the log calls them by."""
        self._hearing: dict[str, list[EventListener]] = {event: [] for event in EVENTS}
        self._names: dict[int, str] = {}
        for name, listener in (listeners or {}).items():
            self.add(listener)
            self._names[id(listener)] = name

    def hears(self, event: str) -> bool:
        """Whether anyone would be told of ``event``, the name of a method of ``EventListener``."""
        return bool(self._hearing[event])

    def add(self, listener: EventListener) -> None:
        for event, hearing in self._hearing.items():
            method = getattr(listener, event, None)
            if method is not None and getattr(method, "__func__", method) is not getattr(
                EventListener, event
            ):
                hearing.append(listener)

    def tell(self, event: str, *values: object) -> None:
        for listener in tuple(self._hearing[event]):
            try:
                getattr(listener, event)(*values)
            except Exception:
                # A listener is a guest of the engine: its faults end its own subscription and nothing else.
                name = self._names.get(id(listener), repr(listener))
                logging.getLogger("kvpage").exception(
                    "event listener %s failed in %s and is dropped", name, event
                )
                for hearing in self._hearing.values():
                    hearing[:] = [other for other in hearing if other is not listener]


class StatsLog(EventListener):
    """Logs one line every ``LOG_INTERVAL`` seconds in which there was work."""

    def __init__(self, stats: Callable[[], EngineStats]) -> None:
        self._stats = stats
        self._logger = logging.getLogger("kvpage.stats")
        self._last = time.monotonic()
        self._before = stats()

    def step(self, stats: StepStats) -> None:
        now = time.monotonic()
        seconds = now - self._last
        if seconds < LOG_INTERVAL:
            return
        current, before = self._stats(), self._before
        hit_rate = 100 * current.prefix_hits / current.prefix_queries if current.prefix_queries else 0.0
        self._logger.info(
            "Avg prompt throughput: %.1f tokens/s, Avg generation throughput: %.1f tokens/s, Running: %d reqs, "
            "Waiting: %d reqs, KV cache usage: %.1f%%, Prefix cache hit rate: %.1f%%",
            (current.prompt_tokens - before.prompt_tokens) / seconds,
            (current.generated_tokens - before.generated_tokens) / seconds,
            current.running,
            current.waiting,
            100 * current.kv_usage,
            hit_rate,
        )
        self._last, self._before = now, current
