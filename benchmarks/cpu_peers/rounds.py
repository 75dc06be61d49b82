"""Engines in turn on the same workload, the machine's bounds measured between any two runs."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from cpu_peers.machine import QUIET, Guard, Worker, WorkerError
from cpu_peers.workloads import ARITHMETIC, Workload

HERE = Path(__file__).resolve().parent
MODULES = {
    "kvpage": "engine_kvpage",
    "llama.cpp": "engine_llamacpp",
    "openvino": "engine_openvino",
    "vllm": "engine_vllm",
    "transformers": "engine_transformers",
}


@dataclass(frozen=True)
class Setup:
    """What does not change between runs.

    Attributes:
        pythons: the interpreter of each engine's environment.
        attempts: runs at most, where others used the machine; the quietest counts.
        wait: seconds to wait for a quiet machine before a run.
        patience: seconds that an engine may take to load, or to run a workload.
    """

    models: Path
    pythons: Mapping[str, str]
    threads: int
    attempts: int
    wait: float
    patience: float
    log: BinaryIO

    def environment(self, engine: str) -> dict[str, str]:
        """Variables of an engine's process."""
        path = [str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
        variables = {
            "PYTHONPATH": os.pathsep.join(path),
            "OMP_NUM_THREADS": str(self.threads),
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        if engine == "vllm":
            variables |= {
                "VLLM_CPU_KVCACHE_SPACE": "4",
                "VLLM_CPU_OMP_THREADS_BIND": f"0-{self.threads - 1}",
                "VLLM_TARGET_DEVICE": "cpu",
                "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
                "VLLM_LOGGING_LEVEL": "WARNING",
                "VLLM_NO_USAGE_STATS": "1",
            }
            # Its CPU page asks for these two, where they are.
            root = Path(self.pythons[engine]).parent.parent
            preloads = ["/usr/lib/x86_64-linux-gnu/libtcmalloc_minimal.so.4", str(root / "lib/libiomp5.so")]
            found = [each for each in preloads if Path(each).exists()]
            if found:
                variables["LD_PRELOAD"] = ":".join(found)
        return variables


STARTS = 4
LONG_START = 20.0
"""Seconds; an engine that takes longer to start is started once."""


class Bounds:
    """The probe: read bandwidth and rates of products, as the machine gives them now."""

    def __init__(self, setup: Setup) -> None:
        command = [setup.pythons["probe"], "-m", "cpu_peers.probe", str(setup.threads)]
        self._worker = Worker(command, setup.environment("probe"), setup.log, setup.patience)
        self.about = self._worker.hello

    def measure(self, dtype: str) -> dict[str, float]:
        """``bandwidth`` in bytes a second, and ``arithmetic`` in operations a second of the products of a type."""
        kind = ARITHMETIC[dtype]
        found = self._worker.ask([kind])
        return {"bandwidth": found["bandwidth"], "arithmetic": found[kind]}

    def close(self) -> None:
        """End the process."""
        self._worker.close()


@contextmanager
def probe(setup: Setup) -> Iterator[Bounds]:
    """The probe, ended in the end."""
    bounds = Bounds(setup)
    try:
        yield bounds
    finally:
        bounds.close()


@contextmanager
def loaded(
    setup: Setup, engines: Sequence[str], model: str, dtype: str, **sizes: int
) -> Iterator[dict[str, Started]]:
    """Workers of those engines that load this model in this type; each is loaded while the others stand still."""
    started: dict[str, Started] = {}
    job = {"models": str(setup.models), "model": model, "dtype": dtype, "threads": setup.threads, **sizes}
    try:
        for engine in engines:
            command = [setup.pythons[engine], "-m", f"cpu_peers.{MODULES[engine]}", json.dumps(job)]
            try:
                started[engine] = start(command, setup, engine)
            except WorkerError as error:
                say(f"{model} {dtype} {engine}: {error}")
        yield started
    finally:
        for each in started.values():
            each.worker.close()


@dataclass(frozen=True)
class Started:
    """A worker, and how long it took to start: the last times, after one that warmed the file cache."""

    worker: Worker
    seconds: list[dict[str, float]]


def start(command: Sequence[str], setup: Setup, engine: str) -> Started:
    """Start a worker, several times over where that takes little time; the last one stays."""
    worker = Worker(command, setup.environment(engine), setup.log, setup.patience)
    seconds = [start_up(worker)]
    while len(seconds) < STARTS and seconds[-1]["process_seconds"] < LONG_START:
        worker.close()
        worker = Worker(command, setup.environment(engine), setup.log, setup.patience)
        seconds.append(start_up(worker))
    return Started(worker, seconds[1:] or seconds)


def say(text: str) -> None:
    """A line for whoever waits."""
    print(text, file=sys.stderr, flush=True)


def start_up(worker: Worker) -> dict[str, float]:
    """Seconds: of importing torch, then of loading, of the first short run, and from the start of the process on."""
    names = ("import_seconds", "load_seconds", "first_run_seconds")
    found = {name: worker.hello[name] for name in names}
    return {**found, "process_seconds": worker.hello["ready_at"] - worker.started_at}


def run_once(worker: Worker, bounds: Bounds, work: Workload, dtype: str, setup: Setup) -> dict[str, Any]:
    """One run between two readings of the bounds; again while others used the machine, up to ``attempts``.

    Returns:
        seconds, first_token_seconds, foreign (0..1), bandwidth and arithmetic (means of the two readings), attempts.

    Raises:
        WorkerError: the engine could not.
    """
    guard = Guard()
    best: dict[str, Any] = {}
    attempt = 0
    while attempt < setup.attempts and best.get("foreign", 1.0) >= QUIET:
        attempt += 1
        worker.ask({"do": "prepare", "work": lines(work)})
        guard.wait_until_quiet(setup.wait)
        guard.restart()
        before = bounds.measure(dtype)
        found = worker.ask({"do": "run", "work": lines(work)})
        after = bounds.measure(dtype)
        found["foreign"] = guard.foreign()
        found |= {name: (before[name] + after[name]) / 2 for name in before}
        if not best or found["foreign"] < best["foreign"]:
            best = found
    return {**best, "attempts": attempt}


def lines(work: Workload) -> dict[str, Any]:
    """A workload as a worker reads it."""
    return {**asdict(work), "requests": [(list(each.prompt), each.new) for each in work.requests]}


def compare(
    setup: Setup,
    bounds: Bounds,
    engines: Sequence[str],
    model: str,
    dtype: str,
    works: Sequence[Workload],
    rounds: int,
) -> dict[str, list[dict[str, Any]]]:
    """``rounds`` rounds of every workload; in a round the engines run it one after another, in turns from either end.

    Returns:
        "runs": one record a run, and "engines": one an engine, with version, start-up and peak memory.
    """
    runs: list[dict[str, Any]] = []
    about: list[dict[str, Any]] = []
    with loaded(setup, engines, model, dtype) as started:
        workers = {engine: each.worker for engine, each in started.items()}
        for engine, worker in workers.items():
            which = {"model": model, "dtype": dtype, "engine": engine, "version": worker.hello["version"]}
            about.append(
                {**which, "starts": started[engine].seconds, "peak_bytes_ready": worker.peak_memory()}
            )
        for number in range(rounds):
            for work in works:
                for engine in list(workers)[:: 1 if number % 2 == 0 else -1]:
                    cell = {
                        "model": model,
                        "dtype": dtype,
                        "workload": work.name,
                        "engine": engine,
                        "round": number,
                    }
                    try:
                        found = run_once(workers[engine], bounds, work, dtype, setup)
                    except WorkerError as error:
                        say(f"{model} {dtype} {work.name} {engine}: {error}")
                        workers.pop(engine).close()
                        continue
                    runs.append({**cell, **found, "peak_bytes": workers[engine].peak_memory()})
                    say(f"round {number}: {model} {dtype} {work.name} {engine}: {found['seconds']:.3f} s")
        for record in about:
            peaks = [run["peak_bytes"] for run in runs if run["engine"] == record["engine"]]
            record["peak_bytes"] = max(peaks, default=record["peak_bytes_ready"])
    return {"runs": runs, "engines": about}
