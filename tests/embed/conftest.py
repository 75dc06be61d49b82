"""A tiny model, AsyncEngines of it, and fresh processes that embed one."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kvpage import AsyncEngine
from tiny_checkpoint import write_checkpoint

MakeAsync = Callable[..., AsyncEngine]
RunProgram = Callable[..., str]
TESTS = Path(__file__).resolve().parents[1]
SOURCE = TESTS.parent / "src"


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a random Llama with tokenizer and chat template."""
    return write_checkpoint(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def make_async(tiny: Path) -> Iterator[MakeAsync]:
    """make_async(**options) -> AsyncEngine; after the test it must be empty and whole, and is closed."""
    made: list[AsyncEngine] = []

    def make(model: Any = tiny, *, kind: type[AsyncEngine] = AsyncEngine, **options: Any) -> AsyncEngine:
        made.append(kind(model, **options))
        return made[-1]

    yield make
    for engine in made:
        core = engine._worker.core
        engine.close()
        assert not engine._worker.alive
        core.scheduler.check()
        stats = core.stats()
        assert (stats.running, stats.waiting, stats.used_blocks) == (0, 0, 0), stats


@pytest.fixture
def run_program(tiny: Path, tmp_path: Path) -> RunProgram:
    """run_program(source, *arguments) -> its output. It must end by itself with status 0; ``{model}`` in the
    source is the tiny model's folder."""

    def run(source: str, *arguments: str, timeout: float = 60.0) -> str:
        program = tmp_path / "program.py"
        program.write_text(source.replace("{model}", str(tiny)), encoding="utf-8")
        path = os.pathsep.join([str(SOURCE), str(TESTS)])
        done = subprocess.run(
            [sys.executable, str(program), *arguments], capture_output=True, text=True, timeout=timeout, check=False,
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stderr, done.stderr
        return done.stdout

    return run
