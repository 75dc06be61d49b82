"""How kvpage's decode scales: over the batch, over the context, over threads."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from cpu_peers.machine import Guard, Worker, WorkerError
from cpu_peers.rounds import Setup, lines, loaded, probe, say
from cpu_peers.workloads import Shape, even_batch

BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)
BATCH_CONTEXT = 128
CONTEXTS = (128, 256, 512, 1024, 2048, 4096, 8192)
CONTEXT_BATCHES = (1, 8)
STEPS = 32


def scaling(
    setup: Setup, model: str, dtype: str, threads: Sequence[int], largest: int
) -> list[dict[str, Any]]:
    """Decode steps of every batch and context, for each number of threads.

    Args:
        largest: contexts beyond it are left out.

    Returns:
        One record a point: batch, context, threads, median seconds of a step, the bounds measured around it.
    """
    vocabulary = Shape.read(setup.models / f"{model}-bf16").vocabulary
    found = []
    for count in threads:
        here = replace(setup, threads=count)
        sizes = {"max_tokens": min(largest, max(CONTEXTS)) + 2 * STEPS, "max_requests": max(BATCHES)}
        with probe(here) as bounds, loaded(here, ["kvpage"], model, dtype, **sizes) as started:
            if "kvpage" not in started:
                continue
            worker = started["kvpage"].worker
            for batch, context in points(largest):
                guard = Guard()
                guard.wait_until_quiet(setup.wait)
                guard.restart()
                before = bounds.measure(dtype)
                try:
                    steps = decode(worker, batch, context, vocabulary)
                except WorkerError as error:
                    say(f"{model} {dtype} {batch} x {context}: {error}")
                    break
                after = bounds.measure(dtype)
                point = {"model": model, "dtype": dtype, "threads": count, "batch": batch, "context": context}
                step = {
                    "step_seconds": statistics.median(steps),
                    "steps": len(steps),
                    "foreign": guard.foreign(),
                }
                found.append({**point, **step, **{name: (before[name] + after[name]) / 2 for name in before}})
                say(
                    f"{model} {dtype} {count} threads, {batch} x {context}: {batch / point_seconds(found[-1]):.1f} tok/s"
                )
    return found


def points(largest: int) -> Iterator[tuple[int, int]]:
    """Every (batch, context) once."""
    for batch in BATCHES:
        yield batch, BATCH_CONTEXT
    for context in CONTEXTS:
        for batch in CONTEXT_BATCHES:
            if context != BATCH_CONTEXT and context <= largest:
                yield batch, context


def decode(worker: Worker, batch: int, context: int, vocabulary: int) -> list[float]:
    """Seconds of each of the decode steps around a context (half of them before it is reached)."""
    work = even_batch(batch, context - STEPS // 2, 4 * STEPS, vocabulary)
    steps: list[float] = worker.ask({"do": "decode", "work": lines(work), "steps": STEPS})["steps"]
    return steps


def point_seconds(point: dict[str, Any]) -> float:
    """Seconds of a step."""
    return float(point["step_seconds"])
