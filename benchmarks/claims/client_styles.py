"""Q15: a synchronous client beside an asynchronous one, the same requests on the bundled model.

    python benchmarks/claims/client_styles.py [--requests 16] [--new-tokens 32] [--rounds 3] [--json]

Rounds alternate between the styles; throughput is the median, as a ratio to one request after the other. Timing
depends on the machine, ratios less so.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from statistics import median

from report import arguments, show

from kvpage import AsyncEngine, Engine, SamplingParams

ONE_BY_ONE = "sync, one after the other"
THREADS = "sync, a thread a request"
THREADS_ASYNC_ENGINE = "threads on AsyncEngine"
GATHER = "async, gather"


def prompts(count: int) -> list[str]:
    """Different beginnings, so that no prefix is shared."""
    return [f"{number}: a block table is" for number in range(count)]


def in_threads(ask: Callable[[str], object], texts: list[str]) -> None:
    """Every prompt in a thread of its own."""
    with ThreadPoolExecutor(len(texts)) as pool:
        list(pool.map(ask, texts))


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--new-tokens", type=int, default=32, help="of every request")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    params = SamplingParams(temperature=0, max_tokens=options.new_tokens, ignore_eos=True)
    texts = prompts(options.requests)

    async def answer(engine: AsyncEngine, text: str) -> None:
        await engine.generate(text, params)

    async def answer_all(engine: AsyncEngine) -> None:
        await asyncio.gather(*[answer(engine, text) for text in texts])

    seconds: dict[str, list[float]] = {}
    sync_engine = Engine("demo", enable_prefix_caching=False)
    async_engine = AsyncEngine("demo", enable_prefix_caching=False)
    styles: dict[str, Callable[[], object]] = {
        ONE_BY_ONE: lambda: [sync_engine.generate(text, params) for text in texts],
        THREADS: lambda: in_threads(lambda text: sync_engine.generate(text, params), texts),
        THREADS_ASYNC_ENGINE: lambda: in_threads(lambda text: asyncio.run(answer(async_engine, text)), texts),
        GATHER: lambda: asyncio.run(answer_all(async_engine)),
    }
    try:
        for number in range(options.rounds + 1):
            for name, run in styles.items():
                start = time.perf_counter()
                run()
                if number:  # the first round warms up
                    seconds.setdefault(name, []).append(time.perf_counter() - start)
    finally:
        sync_engine.close()
        asyncio.run(async_engine.aclose())
    base = median(seconds[ONE_BY_ONE])
    ratios = {name: round(base / median(values), 1) for name, values in seconds.items()}
    show(
        {
            f"{options.requests} requests of {options.new_tokens} new tokens": [
                {"client": name, "x throughput": ratio} for name, ratio in ratios.items()
            ]
        },
        {
            "Q15": f"bounded: waiting for each answer before asking the next costs x {ratios[GATHER]:g}; synchronous "
            f"calls in threads give x {ratios[THREADS]:g} and x {ratios[THREADS_ASYNC_ENGINE]:g} of it back"
        },
        options.json,
    )


if __name__ == "__main__":
    main()
