"""The worker's side: an engine loaded once that runs a workload whenever it is told to, one JSON line each way.

Every engine has a module ``engine_<name>`` that gives ``serve`` a function which loads it. A worker is started as
``python -m cpu_peers.engine_<name> '{"models": ..., "model": ..., "dtype": ..., "threads": ...}'`` and answers

    {"do": "prepare", "work": {...}}    what must not be timed: caches emptied, a few tokens computed
    {"do": "run", "work": {...}}        the requests, timed
    {"do": "decode", "work": {...}}     seconds of each step in which every request gains a token (kvpage only)
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cpu_peers.workloads import Request, Workload, workload


@dataclass(frozen=True)
class Job:
    """What a worker loads. ``models`` holds folders and files named ``<model>-<kind>``."""

    models: Path
    model: str
    dtype: str
    threads: int
    max_tokens: int = 4096
    max_requests: int = 64

    def find(self, *kinds: str) -> Path:
        """The first of ``<model>-<kind>`` that exists."""
        paths = [self.models / f"{self.model}-{kind}" for kind in kinds]
        for path in paths:
            if path.exists():
                return path
        raise SystemExit(f"there is none of {', '.join(map(str, paths))}; see cpu_peers/convert.py")


@dataclass(frozen=True)
class Answer:
    """One timed run: seconds from the first request to the last token, and to the first token where it is known."""

    seconds: float
    new_tokens: int
    first_token_seconds: float | None = None


class LoadedEngine:
    """An engine with its model in memory."""

    version = ""

    def details(self) -> dict[str, Any]:
        """What the engine chose itself, for the record."""
        return {}

    def prepare(self, work: Workload) -> None:
        """Do what must be done before ``run(work)`` and is not timed. By default nothing."""

    def run(self, work: Workload) -> Answer:
        """Make all requests at once, greedy and to their last token."""
        raise NotImplementedError

    def decode(self, work: Workload, steps: int) -> list[float]:
        """Seconds of each of ``steps`` steps that give every request a token."""
        raise NotImplementedError(f"{type(self).__name__} cannot time its steps")


Load = Callable[[Job], LoadedEngine]


def serve(load: Load, *, imports: Callable[[], object] | None = None) -> None:
    """Load the engine of the job in ``sys.argv``, then answer lines until there are no more.

    Args:
        imports: what the host of such an engine has imported anyway (torch); its time is stated apart.
    """
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what engines print is not an answer

    def answer(**fields: Any) -> None:
        answers.write(json.dumps(fields) + "\n")
        answers.flush()

    began = time.monotonic()
    if imports is not None:
        imports()
    imported = time.monotonic()
    fields = json.loads(sys.argv[1])
    job = Job(**{**fields, "models": Path(fields["models"])})
    engine = load(job)
    ready = time.monotonic()
    engine.run(short_work())
    answer(
        version=engine.version,
        details=engine.details(),
        import_seconds=imported - began,
        load_seconds=ready - imported,
        first_run_seconds=time.monotonic() - ready,
        ready_at=ready,
    )
    for line in sys.stdin:
        try:
            answer(**_do(engine, json.loads(line)))
        except Exception as error:  # the other engines go on; the message is part of the result
            traceback.print_exc()
            answer(error=f"{type(error).__name__}: {error}"[:300])


def short_work() -> Workload:
    """Two short requests, of ids that every vocabulary has."""
    return Workload("warm", [Request(request.prompt[:64], 8) for request in workload("b", 200).requests[:2]])


def _do(engine: LoadedEngine, message: dict[str, Any]) -> dict[str, Any]:
    fields = message["work"]
    work = Workload(fields["name"], [Request(*each) for each in fields["requests"]], fields["shared"])
    if message["do"] == "prepare":
        engine.prepare(work)
        engine.run(short_work())
        return {}
    if message["do"] == "decode":
        return {"steps": engine.decode(work, message["steps"])}
    found = engine.run(work)
    if found.new_tokens != work.new_tokens:
        raise RuntimeError(f"{found.new_tokens} new tokens came, {work.new_tokens} were asked for")
    return {"seconds": found.seconds, "first_token_seconds": found.first_token_seconds}
