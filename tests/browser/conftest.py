"""A server slow enough to be watched, with a key and without."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from page_server import KEY, Brake, Served, serving

from kvpage import AsyncEngine
from tiny_checkpoint import write_checkpoint

STEP_SECONDS = 0.02


@pytest.fixture(scope="session")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AsyncEngine]:
    folder = write_checkpoint(tmp_path_factory.mktemp("models") / "tiny")
    engine = AsyncEngine(folder, num_kv_blocks=200, block_size=16)
    engine._worker.core.listeners.add(Brake(STEP_SECONDS))
    yield engine
    engine.close()


@pytest.fixture(scope="session")
def guarded(engine: AsyncEngine) -> Iterator[Served]:
    """A server that asks for ``KEY``."""
    with serving(engine, "tiny", api_keys=(KEY,)) as served:
        yield served


@pytest.fixture(scope="session")
def unguarded(engine: AsyncEngine) -> Iterator[Served]:
    """A server without a key."""
    with serving(engine, "tiny") as served:
        yield served
