"""Q3, Q4: requests at once, throughput and memory, contiguous beside paged, with the same pool. No model, no GPU.

    python benchmarks/claims/concurrency.py [--tokens 120000] [--seeds 2] [--json]

Every row serves the same queue, first come, first served. "x" columns are kvpage's figure over the row's. Requests
at once are counted. Throughput is a model: a step takes the longer of reading weights and KV at 1,555 GB/s and
computing at 312 TFLOP/s (OPT-13B on an A100-40GB), so only its ratios say anything. "same work in" is the share of
the pool in which kvpage reaches the row's modelled throughput, in steps of 5 % and from 15 % on: less does not hold
a request of max_model_len.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

from report import arguments, show
from simulation.allocators import CONTIGUOUS, RESERVE_MAX, FirstFit, reserve_longest
from simulation.serving import OPT_13B, Outcome, serve_contiguous, serve_paged
from simulation.workloads import ALPACA, LONG, MAX_MODEL_LEN, SHAREGPT, Job, Workload

from kvpage.cache.manager import BlockManager
from kvpage.cache.tables import GroupConfig
from kvpage.sched.plan import StepPlan

BLOCK_SIZE = 16
ONE_AT_A_TIME = "one request at a time"
STATIC = "static batches, max_model_len"
LONGER = reserve_longest(2 * MAX_MODEL_LEN)
ROWS = (ONE_AT_A_TIME, STATIC, LONGER.name, *(policy.name for policy in CONTIGUOUS))
POLICIES = {policy.name: policy for policy in (*CONTIGUOUS, LONGER)}
SMALL_POOLS = (2048, 4096)
POOL_PERCENTS = range(15, 101, 5)
CHOSEN = (SHAREGPT, ALPACA, LONG)


def baseline(name: str, jobs: list[Job], workload: Workload) -> Outcome:
    """Serve without blocks."""
    if name == ONE_AT_A_TIME:
        return serve_contiguous(jobs, RESERVE_MAX, workload, replace(OPT_13B, slots=MAX_MODEL_LEN))
    if name == STATIC:
        return serve_contiguous(jobs, RESERVE_MAX, workload, static=True)
    return serve_contiguous(jobs, POLICIES[name], workload)


def paged_curve(jobs: list[Job]) -> dict[int, float]:
    """Percent of the pool -> kvpage's modelled throughput in so much of it."""
    return {
        percent: serve_paged(
            jobs, BLOCK_SIZE, replace(OPT_13B, slots=OPT_13B.slots * percent // 100)
        ).throughput
        for percent in POOL_PERCENTS
    }


def rows(workload: Workload, tokens: int, seeds: int) -> list[dict[str, Any]]:
    """Every baseline on one workload; the memory column for the first seed only."""
    runs = [workload.jobs(tokens, seed) for seed in range(seeds)]
    paged = [serve_paged(jobs, BLOCK_SIZE) for jobs in runs]
    curve = paged_curve(runs[0])
    table = []
    for name in ROWS:
        others = [baseline(name, jobs, workload) for jobs in runs]
        at_once = [mine.concurrency / other.concurrency for mine, other in zip(paged, others, strict=True)]
        speed = [mine.throughput / other.throughput for mine, other in zip(paged, others, strict=True)]
        enough = [percent for percent, reached in curve.items() if reached >= others[0].throughput]
        table.append(
            {
                "baseline": name,
                "at once": round(fmean(other.concurrency for other in others), 1),
                "kvpage": round(fmean(mine.concurrency for mine in paged), 1),
                "x at once": round(fmean(at_once), 1),
                "x throughput": round(fmean(speed), 1),
                "same work in %": min(enough, default=100),
            }
        )
    return table


def small_pools(tokens: int) -> list[dict[str, Any]]:
    """Where a contiguous allocator fits one or two requests of max_model_len: how many run with blocks."""
    table = []
    for workload in CHOSEN:
        jobs = workload.jobs(tokens // 2, 0)
        for slots in SMALL_POOLS:
            machine = replace(OPT_13B, slots=slots)
            other = serve_contiguous(jobs, RESERVE_MAX, workload, machine)
            mine = serve_paged(jobs, BLOCK_SIZE, machine)
            table.append(
                {
                    "lengths": workload.name,
                    "slots": slots,
                    "contiguous": round(other.concurrency, 1),
                    "kvpage": round(mine.concurrency, 1),
                    "x at once": round(mine.concurrency / other.concurrency, 1),
                }
            )
    return table


def scattered(blocks: int = 64) -> list[dict[str, Any]]:
    """Fill the pool with short sequences, end every second one, and ask for all that is free at once."""
    groups = [GroupConfig("full", blocks + 1)]
    manager = BlockManager(block_size=BLOCK_SIZE, groups=groups, enable_prefix_caching=False)
    run_allocator = FirstFit(blocks * BLOCK_SIZE)
    holders = [manager.open() for _ in range(blocks)]
    taken = []
    for slot, holder in enumerate(holders):
        manager.admit(holder, slot, BLOCK_SIZE, 0, BLOCK_SIZE, StepPlan(0))
        taken.append(run_allocator.take(BLOCK_SIZE))
    for holder, run in list(zip(holders, taken, strict=True))[::2]:
        manager.free(holder)
        assert run is not None
        run_allocator.give_back(*run)
    wanted = blocks // 2 * BLOCK_SIZE
    has_run = run_allocator.take(wanted) is not None
    has_blocks = manager.admit(manager.open(), 0, wanted, 0, wanted, StepPlan(0))
    return [
        {
            "allocator": "first fit",
            "free slots": wanted,
            "asked for": wanted,
            "given": "yes" if has_run else "no",
        },
        {
            "allocator": "kvpage",
            "free slots": wanted,
            "asked for": wanted,
            "given": "yes" if has_blocks else "no",
        },
    ]


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--tokens", type=int, default=120_000, help="of all requests of a run together")
    parser.add_argument("--seeds", type=int, default=2, help="runs that the figures are means of")
    options = parser.parse_args()
    tables = {w.name: rows(w, options.tokens, options.seeds) for w in CHOSEN}
    pools, holes = small_pools(options.tokens), scattered()
    chat = tables[SHAREGPT.name]
    contiguous = {policy.name for policy in CONTIGUOUS}

    def between(table: Sequence[dict[str, Any]], column: str) -> str:
        values = [line[column] for line in table if line["baseline"] in contiguous]
        return f"{min(values):g} to {max(values):g}"

    every = [line for table in tables.values() for line in table]
    titles = {f"{w.name} ({w.about})": tables[w.name] for w in CHOSEN}
    show(
        {**titles, "Pools that hold 1 or 2 requests of max_model_len": pools, "A pool full of holes": holes},
        {
            "Q3": f"bounded: {SHAREGPT.name}, continuous batching on both sides: throughput x "
            f"{between(chat, 'x throughput')}, at once x {between(chat, 'x at once')}, the same work in "
            f"{between(chat, 'same work in %')} % of the memory; one request at a time: throughput x "
            f"{chat[0]['x throughput']:g}, static batches x {chat[1]['x throughput']:g}",
            "Q4": f"bounded: {SHAREGPT.name} x "
            f"{between(chat, 'x at once')} at once; all lengths x {between(every, 'x at once')}; "
            f"all free blocks of a pool full of holes given to one sequence: {holes[1]['given']}",
        },
        options.json,
    )


if __name__ == "__main__":
    main()
