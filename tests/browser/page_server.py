"""A server in a thread of this process, for the browser."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import uvicorn

from kvpage import AsyncEngine, PluginRegistry
from kvpage.api.events import EventListener, StepStats
from kvpage_server.app import create_app
from kvpage_server.service import Service
from kvpage_server.settings import ServerSettings

KEY = "sk-of-the-browser-tests"


class Brake(EventListener):
    """Holds every step up, so that a small model takes as long as a large one."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def step(self, stats: StepStats) -> None:
        time.sleep(self._seconds)


@dataclass
class Served:
    """A running server."""

    address: str
    engine: AsyncEngine


@contextmanager
def serving(engine: AsyncEngine, name: str, **settings: object) -> Iterator[Served]:
    """A server of ``engine`` until the block ends."""
    service = Service(engine, ServerSettings(model_names=(name,), **settings), PluginRegistry())
    config = uvicorn.Config(create_app(service), port=0, ws="none", log_level="warning")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, name="server")
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the server did not start"
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield Served(f"http://127.0.0.1:{port}/", engine)
    finally:
        server.should_exit = True
        thread.join()
