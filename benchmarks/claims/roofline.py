"""Q6: the most tokens a second that a 70B model in 4 bits can generate on given cards, and what was claimed.

    python benchmarks/claims/roofline.py [--json]

An upper bound: every product at the data sheet's dense 16-bit rate (AWQ kernels compute in float16), weights and KV
read at the full bandwidth, prompts, attention arithmetic, sampling and links between cards free of charge. A step
decodes as many sequences as fit into the memory that `kvpage plan` leaves for KV, each half way through its answer.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model_shapes import SHAPES, write_shapes
from report import arguments, show

from kvpage.config import EngineOptions
from kvpage.inspect.checkpoint import planned_model
from kvpage.inspect.plan import Devices, MemoryPlan, plan_memory
from kvpage.plugins import PluginRegistry

CLAIMED_REQUESTS, CLAIMED_OTHER, OUTPUT_TOKENS = 18, 4, 512
PROMPT_TOKENS = 1
SHAPE = "llama-3.1-70b-awq"


@dataclass(frozen=True, slots=True)
class Card:
    """Peak rates of a data sheet: dense 16-bit FLOP/s, bytes/s."""

    name: str
    memory: int
    flops: float
    bandwidth: float


A100 = Card("A100-80GB", 80 * 10**9, 312e12, 2.039e12)
H100 = Card("H100-80GB", 80 * 10**9, 989e12, 3.35e12)
MACHINES = ((A100, 1), (A100, 4), (H100, 1))


def plan(shape: str, card: Card, count: int) -> MemoryPlan:
    """What `kvpage plan` says of the shape on so many cards."""
    with tempfile.TemporaryDirectory() as folder:
        write_shapes(Path(folder))
        options = EngineOptions(model=str(Path(folder) / shape), max_model_len=4096)
        model = planned_model(options, PluginRegistry())
        return plan_memory(model, options, Devices(kind="cuda", memory=card.memory, count=count))


def bound(card: Card, count: int) -> dict[str, Any]:
    """Tokens a second at most, by arithmetic and by memory."""
    sizes = plan(SHAPE, card, count)
    # Weights that a token is multiplied with: all but the embedding, of which it reads one row.
    multiplied = sizes.weights.parameters - SHAPES[SHAPE]["hidden_size"] * SHAPES[SHAPE]["vocab_size"]
    computed = count * card.flops / (2 * multiplied)
    at_once = sizes.tokens // (PROMPT_TOKENS + OUTPUT_TOKENS)
    context = at_once * (PROMPT_TOKENS + OUTPUT_TOKENS // 2)
    read = sizes.weights.total_bytes + context * sizes.total_kv_bytes_per_token
    by_memory = at_once * count * card.bandwidth / read
    most = min(computed, by_memory)
    return {
        "cards": f"{count} x {card.name}",
        "KV tokens": sizes.tokens,
        "at once": at_once,
        "by arithmetic, tok/s": round(computed),
        "by memory, tok/s": round(by_memory),
        "requests/s at most": round(most / OUTPUT_TOKENS, 1),
    }


def main() -> None:
    options = arguments(__doc__).parse_args()
    table = [bound(card, count) for card, count in MACHINES]
    most = table[0]["requests/s at most"]
    claimed = CLAIMED_REQUESTS * OUTPUT_TOKENS
    length = table[0]["by arithmetic, tok/s"] // CLAIMED_REQUESTS
    word = "refuted" if most < CLAIMED_REQUESTS else "bounded"
    show(
        {f"Llama-3.1-70B in AWQ 4 bit, answers of {OUTPUT_TOKENS} tokens": table},
        {
            "Q6": f"{word}: {CLAIMED_REQUESTS} requests/s are {claimed:,} tok/s; one card's bound is {most:g} "
            f"requests/s, and {CLAIMED_REQUESTS} need answers of no more than {length} tokens; the {CLAIMED_OTHER} of the "
            f"comparison would be {round(100 * CLAIMED_OTHER / most)} % of it"
        },
        options.json,
    )


if __name__ == "__main__":
    main()
