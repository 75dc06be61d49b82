"""Ctrl-C while something runs that must not be cut in the middle: an import, a step of the engine.

Only the command line installs signal handlers, each for as long as one ``with`` block.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """While entered, Ctrl-C interrupts nothing: it makes the given function true. A second one interrupts.

    A step of the engine is left whole that way. Signals belong to the main thread; elsewhere nothing changes.
    """
    asked = threading.Event()
    before = signal.getsignal(signal.SIGINT)

    def ask(number: int, frame: FrameType | None) -> None:
        if asked.is_set() and callable(before):
            before(number, frame)
        asked.set()

    if threading.current_thread() is not threading.main_thread() or not callable(before):
        # An ignored SIGINT (a job in the background) stays ignored.
        yield asked.is_set
        return
    signal.signal(signal.SIGINT, ask)
    try:
        yield asked.is_set
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def undivided() -> Iterator[None]:
    """Ctrl-C waits for the end of the block, whatever that is; a second one interrupts at once.

    For imports: libraries try optional parts in a ``try`` that takes any exception, a KeyboardInterrupt too,
    and then run on without them.

    Raises:
        KeyboardInterrupt: after the block, if it was asked for within.
    """
    with interruptible() as asked:
        try:
            yield
        finally:
            if asked():
                raise KeyboardInterrupt
