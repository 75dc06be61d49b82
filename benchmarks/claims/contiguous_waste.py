"""Q1: how much KV memory contiguous allocation wastes, and what is left of that with blocks. No model, no GPU.

    python benchmarks/claims/contiguous_waste.py [--tokens 300000] [--seeds 3] [--json]

Requests wait all the time. "tokens" is the share of the pool that holds a computed token, mean over the steps;
the rest is waste: "reserved" (for tokens to come), "internal" (reserved and never used, or the end of a block) and
"external" (in no run or block, or rounded up to by the allocator). The pool has 15,700 slots, as OPT-13B on an
A100-40GB in arXiv:2309.06180, table 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from statistics import fmean
from typing import Any

from report import arguments, show
from simulation.allocators import CONTIGUOUS, ORCA
from simulation.serving import Outcome, serve_contiguous, serve_paged
from simulation.workloads import SHAREGPT, WORKLOADS, Job, Workload

BLOCK_SIZE = 16
CLAIMED, TOLERANCE = (60, 80), 5


def row(name: str, serve: Callable[[list[Job]], Outcome], runs: Sequence[list[Job]]) -> dict[str, Any]:
    """One allocator over all seeds, in percent of the pool."""
    outcomes = [serve(jobs) for jobs in runs]

    def percent(part: Callable[[Outcome], float]) -> float:
        return round(100 * fmean(part(outcome) for outcome in outcomes), 1)

    return {
        "allocator": name,
        "tokens %": percent(lambda one: one.share(one.states)),
        "reserved %": percent(lambda one: one.share(one.reserved)),
        "internal %": percent(lambda one: one.share(one.internal)),
        "external %": percent(lambda one: one.external),
        "waste %": percent(lambda one: one.waste),
        "at once": round(fmean(outcome.concurrency for outcome in outcomes), 1),
    }


def rows(workload: Workload, tokens: int, seeds: int) -> list[dict[str, Any]]:
    """Every allocator on one workload."""
    runs = [workload.jobs(tokens, seed) for seed in range(seeds)]
    table = [
        row(policy.name, partial(serve_contiguous, policy=policy, workload=workload), runs)
        for policy in CONTIGUOUS
    ]
    return [*table, row(f"kvpage, blocks of {BLOCK_SIZE}", partial(serve_paged, block_size=BLOCK_SIZE), runs)]


def spread(table: Sequence[dict[str, Any]], names: Sequence[str]) -> tuple[float, float]:
    """Least and most waste of these allocators, in percent."""
    wastes = [line["waste %"] for line in table if line["allocator"] in names]
    return min(wastes), max(wastes)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--tokens", type=int, default=300_000, help="of all requests of a run together")
    parser.add_argument("--seeds", type=int, default=3, help="runs that the figures are means of")
    options = parser.parse_args()
    tables = {w.name: rows(w, options.tokens, options.seeds) for w in WORKLOADS}
    orca = [policy.name for policy in ORCA]
    low, high = spread(tables[SHAREGPT.name], orca)
    outer = [spread(table, [policy.name for policy in CONTIGUOUS]) for table in tables.values()]
    paged = [table[-1]["waste %"] for table in tables.values()]
    is_near = low >= CLAIMED[0] - TOLERANCE and high <= CLAIMED[1] + TOLERANCE
    show(
        {f"{w.name} ({w.about})": tables[w.name] for w in WORKLOADS},
        {
            "Q1": f"{'reproduced' if is_near else 'bounded'}: {low:g} to {high:g} % on "
            f"{SHAREGPT.name} lengths with the paper's three policies; {min(o[0] for o in outer):g} to "
            f"{max(o[1] for o in outer):g} % over all contiguous policies and lengths here; "
            f"{min(paged):g} to {max(paged):g} % with blocks"
        },
        options.json,
    )


if __name__ == "__main__":
    main()
