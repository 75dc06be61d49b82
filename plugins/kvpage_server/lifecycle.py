"""From the first request to the last: signals, draining, the death of the engine, and an exit that leaves nothing."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import time
from collections.abc import Callable, Iterator

import uvicorn

from kvpage import EngineDeadError
from kvpage_server.service import Service

LOG = logging.getLogger("kvpage.server")
LOOK_INTERVAL = 0.2
"""Seconds between two looks at the engine's health; a look waits for nothing."""

LAST_WORDS = 1.0
"""Seconds in which requests that were cut off are told so."""


class SignalFreeServer(uvicorn.Server):
    """uvicorn without its signal handlers, which would raise the signal again at the end."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are handled below."""
        yield


async def serve_until_stopped(
    service: Service,
    config: uvicorn.Config,
    listener: socket.socket,
    *,
    shutdown_timeout: float,
    announce: Callable[[], None],
) -> int:
    """Answer requests until SIGTERM, SIGINT or the engine's death; the process's exit status.

    Args:
        listener: bound; the server listens on it and closes it.
        shutdown_timeout: seconds that open requests may go on. A second signal cuts them off.
        announce: called when the first request can be answered.

    Raises:
        OSError: the socket cannot be listened on.
    """
    loop = asyncio.get_running_loop()
    stop, hurry = asyncio.Event(), asyncio.Event()

    def ask() -> None:
        (hurry if stop.is_set() else stop).set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ask)
    server = SignalFreeServer(config)
    serving = loop.create_task(server.serve(sockets=[listener]))
    try:
        while not server.started and not serving.done():
            await asyncio.sleep(0.01)
        if server.started:
            announce()
        stopped, died = loop.create_task(stop.wait()), loop.create_task(_death(service))
        await asyncio.wait({stopped, died, serving}, return_when=asyncio.FIRST_COMPLETED)
        status = 1 if died.done() or serving.done() else 0
        for task in (stopped, died):
            task.cancel()
        if stop.is_set():
            LOG.info("shutting down: %d requests are open", service.load)
            service.draining = True
        if not await _all_answered(service, shutdown_timeout if status == 0 else LAST_WORDS, hurry):
            service.cancel_all()
            await _all_answered(service, LAST_WORDS, hurry)
    finally:
        server.should_exit = True
        await serving
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)
    return status


async def _death(service: Service) -> None:
    """Returns when the engine has died, unless the server is to outlive it."""
    while True:
        try:
            service.engine.check_health()
        except EngineDeadError as error:
            LOG.error("the engine died: %s", error)
            if service.settings.keep_alive_on_engine_death:
                await asyncio.Event().wait()
            return
        await asyncio.sleep(LOOK_INTERVAL)


async def _all_answered(service: Service, seconds: float, hurry: asyncio.Event) -> bool:
    """Whether no request is open any more after at most ``seconds``."""
    deadline = time.monotonic() + seconds
    while service.load:
        if hurry.is_set() or time.monotonic() >= deadline:
            return False
        await asyncio.sleep(0.01)
    return True
