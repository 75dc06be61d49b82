"""CoreThread: the one thread that owns an AsyncEngine's core, and how others reach it."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from typing import Protocol, TypeVar

from kvpage.engine.core import EngineCore
from kvpage.engine.request import AnyState
from kvpage.errors import EngineDeadError

T = TypeVar("T")
Loop = asyncio.AbstractEventLoop


class Reader(Protocol):
    """Who reads a request, in an event loop; ``loop`` is ``None`` before and after."""

    loop: Loop | None

    def wake(self) -> None:
        """In the loop: the request gained something."""

    def cancel(self) -> None:
        """End the request."""


PATIENCE = 0.1
"""Seconds that steps wait in all for an event loop that still hands out earlier tokens, until it has caught up."""


class Pace:
    """Whether an event loop has handed out what it was last woken for.

    An engine that is quicker than its readers would otherwise take the interpreter from them, step after step, and
    its tokens would come in bursts. A loop that is blocked costs ``PATIENCE`` once; then nobody waits for it.
    """

    __slots__ = ("_patience", "caught_up")

    def __init__(self) -> None:
        self.caught_up = threading.Event()
        self.caught_up.set()
        self._patience = PATIENCE

    def wait(self) -> bool:
        """Whether the loop has caught up, waiting for it while there is patience."""
        began = time.monotonic()
        if self.caught_up.wait(self._patience):
            self._patience = PATIENCE
            return True
        self._patience = max(0.0, self._patience - (time.monotonic() - began))
        return False


class CoreThread:
    """Runs the core in a thread of its own. What others want of the core goes through ``call``."""

    def __init__(self, core: EngineCore) -> None:
        self.core = core
        self._condition = threading.Condition()
        self._commands: deque[Callable[[], None]] = deque()
        self._watched: dict[AnyState, Reader] = {}
        self._paces: weakref.WeakKeyDictionary[Loop, Pace] = weakref.WeakKeyDictionary()
        self._stopping = False
        self._process = os.getpid()
        self._thread = threading.Thread(target=self._run, name="kvpage-engine", daemon=True)
        self._thread.start()

    def call(self, function: Callable[[EngineCore], T]) -> Future[T]:
        """Run ``function(core)`` between two steps; at once in the engine's own thread (a listener's call)."""
        future: Future[T] = Future()

        def run() -> None:
            try:
                future.set_result(function(self.core))
            except BaseException as error:
                # Whatever it was belongs to the caller, who waits for it; the engine's thread goes on.
                future.set_exception(error)

        if threading.current_thread() is self._thread:
            run()
        else:
            self._post(run)
        return future

    def submit(self, state: AnyState) -> None:
        """Hand a request over; what the core refuses becomes the request's error."""

        def run() -> None:
            try:
                self.core.submit(state)
            except Exception as error:
                # Whatever is wrong with a request is told to the one who made it.
                state.fail(error)
                self._wake([state])

        self._post(run)

    def abort(self, state: AnyState) -> None:
        """End this request, and no other that has its id by now. Nothing is left to do if the engine stops."""

        def run() -> None:
            request_id = state.output.request_id
            if self.core.states.get(request_id) is state:
                self._wake(self.core.abort(request_id))

        with suppress(EngineDeadError):
            self._post(run)

    def abort_id(self, request_id: str) -> None:
        """End whichever request has this id."""
        with suppress(EngineDeadError):
            self._post(lambda: self._wake(self.core.abort(request_id)))

    def watch(self, state: AnyState, reader: Reader) -> None:
        """From now on wake the reader when the request gains something."""
        self._watched[state] = reader
        if state.done:
            self._watched.pop(state, None)

    def request_stop(self) -> None:
        """End the thread after the step it is in; every unfinished request ends with "abort"."""
        with self._condition:
            self._stopping = True
            self._condition.notify()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def stop(self) -> None:
        """``request_stop`` and wait. Idempotent. A forked child has no such thread, and maybe a lock it left held."""
        if os.getpid() != self._process:
            return
        self.request_stop()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _post(self, command: Callable[[], None]) -> None:
        if os.getpid() != self._process:
            raise EngineDeadError(
                f"the engine lives in process {self._process} and cannot be used in a fork of it: "
                "make one there"
            )
        with self._condition:
            if self._stopping:
                raise EngineDeadError("the engine is closed; make a new one")
            self._commands.append(command)
            self._condition.notify()

    def _run(self) -> None:
        try:
            self._serve()
        except BaseException as error:
            # Nobody waits for this thread, but many for their requests.
            self.core.die(error)
            raise
        finally:
            with self._condition:
                self._stopping = True
            self.core.close()
            self._wake(list(self._watched))

    def _serve(self) -> None:
        """Commands and steps, until the engine is to stop; commands that came before that are still run."""
        core = self.core
        while True:
            with self._condition:
                while not (self._commands or core.has_work or self._stopping):
                    self._condition.wait()
                commands, self._commands = self._commands, deque()
                stopping = self._stopping
            for command in commands:
                command()
            if stopping:
                return
            if core.has_work:
                self._step()

    def _step(self) -> None:
        states = list(self.core.states.values())
        try:
            changed = self.core.step()
        except EngineDeadError:
            logging.getLogger("kvpage").exception("the engine died; every open request ends with this error")
            changed = states
        self._wake(changed)

    def _wake(self, states: Sequence[AnyState]) -> None:
        """One call into each event loop that has a reader of these requests."""
        readers = [
            reader
            for state in states
            if (reader := self._watched.pop(state, None) if state.done else self._watched.get(state))
        ]
        paces = {loop: self._paces.setdefault(loop, Pace()) for loop in [r.loop for r in readers] if loop}
        keeping_up = {loop: pace for loop, pace in paces.items() if pace.wait()}
        # Readers are looked at again: while we waited, one may have gone to another loop.
        while readers:
            by_loop: dict[Loop, list[Reader]] = {}
            for reader in readers:
                if (loop := reader.loop) is not None:
                    by_loop.setdefault(loop, []).append(reader)
            readers = []
            for loop, woken in by_loop.items():
                told = None
                if loop in keeping_up:
                    told = keeping_up[loop].caught_up
                    told.clear()
                try:
                    loop.call_soon_threadsafe(_wake_all, loop, woken, told)
                except RuntimeError:  # the loop is closed
                    readers += [reader for reader in woken if reader.loop is not loop]
                    for reader in woken:
                        if reader.loop is loop:
                            reader.cancel()  # nobody reads this any more: its request ends


def _wake_all(loop: Loop, readers: Sequence[Reader], told: threading.Event | None) -> None:
    for reader in readers:
        reader.wake()
    if told is not None:
        # The woken tasks run in the loop's next turn; after it they have taken their tokens.
        loop.call_soon(loop.call_soon, told.set)
