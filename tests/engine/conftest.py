"""One tiny model for all tests of the engine, engines of it, and transformers as the oracle."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from engine_state import MakeEngine, assert_empty

from kvpage import Engine
from tiny_checkpoint import write_checkpoint


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a random Llama with tokenizer and chat template."""
    return write_checkpoint(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def shared_engine(tiny: Path) -> Iterator[Engine]:
    """For tests that need no option; each leaves it without requests."""
    with Engine(tiny, seed=0) as engine:
        yield engine


@pytest.fixture
def engine(shared_engine: Engine) -> Iterator[Engine]:
    """The shared engine, which must be empty and whole after the test."""
    yield shared_engine
    assert_empty(shared_engine)


@pytest.fixture
def make_engine(tiny: Path) -> Iterator[MakeEngine]:
    """make_engine(**options); closed after the test, when it must be empty and whole."""
    made: list[Engine] = []

    def make(model: Any = tiny, **options: Any) -> Engine:
        made.append(Engine(model, **options))
        return made[-1]

    yield make
    for engine in made:
        assert_empty(engine)
        engine.close()


@pytest.fixture(scope="session")
def oracle(tiny: Path) -> Any:
    """transformers' model of the same checkpoint."""
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(tiny).eval()
