"""Q5: slots that a sequence holds and does not use: never more than block_size - 1. No model, no GPU.

    python benchmarks/claims/block_waste.py [--tokens 40000] [--json]

Every sequence grows token by token through kvpage's BlockManager; after each token the slots of its blocks are
compared with its length. The share is of all slots held, mean over every token of every sequence.
"""

from __future__ import annotations

from typing import Any

from report import arguments, show
from simulation.workloads import ALPACA, LONG, MAX_MODEL_LEN, SHAREGPT, Job

from kvpage.cache.manager import BlockManager
from kvpage.cache.tables import GroupConfig
from kvpage.sched.plan import StepPlan

BLOCK_SIZES = (1, 8, 16, 32, 64, 128, 256)


def unused_slots(jobs: list[Job], block_size: int) -> tuple[int, int, int]:
    """(most slots that one sequence held and did not use, unused and held, each summed over all tokens).

    Raises:
        AssertionError: a sequence left more than ``block_size - 1`` slots unused.
    """
    blocks = -(-MAX_MODEL_LEN // block_size)
    manager = BlockManager(
        block_size=block_size, groups=[GroupConfig("full", blocks + 1)], enable_prefix_caching=False
    )
    most = unused = held = 0
    for job in jobs:
        holder, edits = manager.open(), StepPlan(0)
        assert manager.admit(holder, 0, job.prompt, 0, job.prompt, edits), "an empty pool holds a prompt"
        for length in range(job.prompt, job.slots + 1):
            if length > job.prompt:
                assert manager.allocate(holder, 0, length - 1, 1, edits), "the pool holds the longest job"
            slots = manager.used_blocks * block_size
            assert slots - length <= block_size - 1, f"{slots} slots for {length} tokens"
            most = max(most, slots - length)
            unused += slots - length
            held += slots
        manager.free(holder)
    manager.check()
    return most, unused, held


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--tokens", type=int, default=40_000, help="of all requests of a workload together")
    options = parser.parse_args()
    table: list[dict[str, Any]] = []
    for block_size in BLOCK_SIZES:
        line: dict[str, Any] = {"block size": block_size, "bound": block_size - 1, "most seen": 0}
        for workload in (SHAREGPT, ALPACA, LONG):
            most, unused, held = unused_slots(workload.jobs(options.tokens, 0), block_size)
            line["most seen"] = max(line["most seen"], most)
            line[f"{workload.name} %"] = round(100 * unused / held, 1)
        table.append(line)
    chosen = next(line for line in table if line["block size"] == 16)
    largest = table[-1]
    show(
        {"Unused slots a sequence, and their share of all slots held": table},
        {
            "Q5": f"bounded: at most block_size - 1 slots a sequence, always; with blocks of 16 that is "
            f"{chosen['ShareGPT-like %']:g} % on {SHAREGPT.name} and {chosen['Alpaca-like %']:g} % on {ALPACA.name} "
            f"lengths, with blocks of {largest['block size']} {largest['ShareGPT-like %']:g} and "
            f"{largest['Alpaca-like %']:g} %"
        },
        options.json,
    )


if __name__ == "__main__":
    main()
