"""What every test of the engine may ask of one."""

from __future__ import annotations

from collections.abc import Callable

from kvpage import Engine

MakeEngine = Callable[..., Engine]


def assert_empty(engine: Engine) -> None:
    """Nothing runs, waits or holds a block, and every invariant of the scheduler holds."""
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.used_blocks) == (0, 0, 0), stats
    engine._core.scheduler.check()
