"""Host time of one step in steady decode: schedule() + commit() + building the batch, no model.

    python benchmarks/host_time.py [--sequences 1 32 256] [--steps 400] [--repeats 5] [--cpu-time] [--output FILE]

Every sequence decodes, blocks fill and are published, new ones are taken; what the model would compute is
replaced by random token ids. The output is JSON, times in milliseconds: per number of running sequences the
median over the repeats of each repeat's median and 99th percentile, for the parts and for their sum. On a machine
that others use too, --cpu-time leaves out the moments when they ran instead.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable

from kvpage import SamplingParams
from kvpage.cache.manager import BlockManager
from kvpage.cache.tables import GroupConfig
from kvpage.runner.batch import BatchBuilder
from kvpage.sched.admission import SchedulerConfig
from kvpage.sched.plan import StepResult
from kvpage.sched.scheduler import Scheduler
from kvpage.sched.sequence import Request

BLOCK_SIZE = 16
VOCABULARY = 32000
END_OF_TEXT = 2
MAX_MODEL_LEN = 4096
MAX_NUM_BATCHED_TOKENS = 8192
PARTS = ("schedule", "build", "commit", "total")


def running_scheduler(sequences: int, steps: int, seed: int) -> Scheduler:
    """A scheduler with ``sequences`` requests of 100 to 500 prompt tokens, none of which ends within ``steps``."""
    draw = random.Random(seed)
    config = SchedulerConfig(sequences, MAX_NUM_BATCHED_TOKENS, MAX_MODEL_LEN)
    blocks = sequences * -(-(500 + steps + 100) // BLOCK_SIZE) + 1
    scheduler = Scheduler(config, BlockManager(block_size=BLOCK_SIZE, groups=[GroupConfig("full", blocks)]))
    for number in range(sequences):
        prompt = [draw.randrange(3, VOCABULARY) for _ in range(draw.randrange(100, 501))]
        scheduler.submit(
            Request(
                f"request-{number}",
                prompt,
                SamplingParams(max_tokens=None, temperature=0.0),
                seed=number,
                arrival=0.0,
                stop_token_ids=frozenset([END_OF_TEXT]),
                eos_token_ids=frozenset([END_OF_TEXT]),
            )
        )
    return scheduler


def measure(sequences: int, steps: int, seed: int, clock: Callable[[], float]) -> dict[str, list[float]]:
    """Milliseconds of every step, by part."""
    scheduler = running_scheduler(sequences, steps, seed)
    builder = BatchBuilder(
        max_num_seqs=sequences,
        max_num_batched_tokens=MAX_NUM_BATCHED_TOKENS,
        max_model_len=MAX_MODEL_LEN,
        block_size=BLOCK_SIZE,
        num_groups=1,
    )
    draw = random.Random(seed)
    times: dict[str, list[float]] = {part: [] for part in PARTS}
    decoding = 0
    while decoding < steps + 20:
        tokens = [draw.randrange(3, VOCABULARY) for _ in range(sequences)]
        start = clock()
        plan = scheduler.schedule()
        scheduled = clock()
        assert plan is not None
        builder.apply(plan)
        builder.build(plan)
        built = clock()
        sampled = tokens[: len(plan.sample_slots)]
        builder.append(plan.sample_slots, sampled)  # type: ignore[arg-type]  # numpy reads the buffer
        result = StepResult(sampled)
        before_commit = clock()
        scheduler.commit(plan, result)
        end = clock()
        if plan.num_short == sequences:
            decoding += 1
        if decoding > 20:  # the first ones warm up
            times["schedule"].append(1e3 * (scheduled - start))
            times["build"].append(1e3 * (built - scheduled))
            times["commit"].append(1e3 * (end - before_commit))
            times["total"].append(1e3 * (end - before_commit + built - start))
    return times


def percentile(values: list[float], share: float) -> float:
    """The smallest value that at least ``share`` of ``values`` do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 32, 256])
    parser.add_argument("--steps", type=int, default=400, help="decode steps a repeat")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--cpu-time", action="store_true", help="count this thread's CPU time, not wall time")
    parser.add_argument("--output", help="also write the JSON to this file")
    args = parser.parse_args()
    clock = time.thread_time if args.cpu_time else time.perf_counter
    results: dict[str, dict[str, dict[str, float]]] = {}
    for sequences in args.sequences:
        runs = []
        for repeat in range(args.repeats):
            gc.collect()
            runs.append(measure(sequences, args.steps, repeat, clock))
        results[str(sequences)] = {
            part: {
                "median": round(statistics.median(statistics.median(run[part]) for run in runs), 4),
                "p99": round(statistics.median(percentile(run[part], 0.99) for run in runs), 4),
            }
            for part in PARTS
        }
    report = {
        "unit": "ms",
        "clock": "cpu" if args.cpu_time else "wall",
        "python": platform.python_version(),
        "machine": platform.machine(),
        "block_size": BLOCK_SIZE,
        "steps": args.steps,
        "repeats": args.repeats,
        "sequences": results,
    }
    text = json.dumps(report, indent=2)
    sys.stdout.write(text + "\n")
    if args.output:
        with open(args.output, "w", encoding="utf-8") as file:
            file.write(text + "\n")


if __name__ == "__main__":
    main()
