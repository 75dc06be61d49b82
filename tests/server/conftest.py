"""One engine and one server for all tests that need no setting; each leaves them without requests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from live_server import LiveServer, live_server

from kvpage import AsyncEngine
from tiny_checkpoint import write_checkpoint


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a random Llama with tokenizer and chat template; 512 tokens of context."""
    return write_checkpoint(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def engine(tiny: Path) -> Iterator[AsyncEngine]:
    engine = AsyncEngine(tiny, seed=0, num_kv_blocks=256, max_num_seqs=16)
    yield engine
    engine.close()


@pytest.fixture(scope="session")
def shared_server(engine: AsyncEngine) -> Iterator[LiveServer]:
    with live_server(engine) as server:
        yield server


@pytest.fixture
def server(shared_server: LiveServer) -> Iterator[LiveServer]:
    """The shared server, which must be idle after the test."""
    yield shared_server
    shared_server.wait_until_idle()
