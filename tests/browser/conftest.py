"""A server in this process, slow enough to be watched, and a browser that notes every problem."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import uvicorn

from kvpage import AsyncEngine, PluginRegistry
from kvpage.api.events import EventListener, StepStats
from kvpage_server.app import create_app
from kvpage_server.service import Service
from kvpage_server.settings import ServerSettings
from tiny_checkpoint import write_checkpoint

KEY = "sk-of-the-browser-tests"
STEP_SECONDS = 0.02


class Brake(EventListener):
    """Holds every step up, so that a tiny model takes as long as a large one."""

    def step(self, stats: StepStats) -> None:
        time.sleep(STEP_SECONDS)


@dataclass
class Served:
    """A running server."""

    address: str
    engine: AsyncEngine


def serve(engine: AsyncEngine, **settings: object) -> Iterator[Served]:
    """Until the generator is closed."""
    service = Service(engine, ServerSettings(model_names=("tiny",), **settings), PluginRegistry())
    config = uvicorn.Config(create_app(service), port=0, ws="none", log_level="warning")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, name="server")
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the server did not start"
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    yield Served(f"http://127.0.0.1:{port}/", engine)
    server.should_exit = True
    thread.join()


@pytest.fixture(scope="session")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AsyncEngine]:
    folder = write_checkpoint(tmp_path_factory.mktemp("models") / "tiny")
    engine = AsyncEngine(folder, num_kv_blocks=200)
    engine._worker.core.listeners.add(Brake())
    yield engine
    engine.close()


@pytest.fixture(scope="session")
def guarded(engine: AsyncEngine) -> Iterator[Served]:
    """A server that asks for ``KEY``."""
    yield from serve(engine, api_keys=(KEY,))


@pytest.fixture(scope="session")
def unguarded(engine: AsyncEngine) -> Iterator[Served]:
    """A server without a key."""
    yield from serve(engine)
