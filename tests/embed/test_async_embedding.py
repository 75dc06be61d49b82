"""AsyncEngine.embed: awaited, cancelled, drained and closed like a request that generates."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from kvpage import (
    AsyncEngine,
    EmbeddingOutput,
    Engine,
    EngineDeadError,
    QueueFullError,
    RequestError,
    SamplingParams,
)

ENDLESS = SamplingParams(temperature=0.0, max_tokens=400, ignore_eos=True)
TEXTS = ["The block pool", "Every request ends in exactly one", "Paged"]
MakeAsync = Callable[..., AsyncEngine]


def idle(engine: AsyncEngine) -> bool:
    stats = engine.stats()
    return (stats.running, stats.waiting, stats.used_blocks) == (0, 0, 0)


def test_awaited_beside_generation_they_are_those_of_the_engine(make_async: MakeAsync, tiny: Path) -> None:
    engine = make_async()

    async def main() -> list[EmbeddingOutput]:
        async with engine.generate("hands out blocks", ENDLESS):
            return await asyncio.gather(*(engine.embed(text) for text in TEXTS))

    outputs = asyncio.run(main())
    with Engine(tiny) as alone:
        expected = alone.embed(TEXTS)
    for output, one in zip(outputs, expected, strict=True):
        assert list(output.embedding) == pytest.approx(list(one.embedding), abs=1e-6)


def test_a_cancelled_one_frees_its_blocks_and_has_no_vector(make_async: MakeAsync) -> None:
    engine = make_async(max_num_batched_tokens=1)

    async def main() -> EmbeddingOutput:
        handle = engine.embed(list(range(3, 300)), request_id="long")
        assert handle.request_id == "long"
        handle.cancel()
        cancelled = await handle
        waiting = asyncio.ensure_future(engine.embed(list(range(3, 300))).result())
        await asyncio.sleep(0.01)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        async with engine.embed(list(range(3, 300))) as left:
            pass
        assert left.done
        return cancelled

    output = asyncio.run(main())
    assert (output.finished, output.finish_reason, len(output.embedding)) == (True, "abort", 0)
    assert idle(engine)


def test_drain_waits_for_it_and_takes_no_more(make_async: MakeAsync) -> None:
    engine = make_async(max_num_batched_tokens=4)

    async def main() -> None:
        handle = engine.embed(list(range(3, 100)))
        assert await engine.drain(30)
        assert handle.done
        with pytest.raises(EngineDeadError, match="draining"):
            engine.embed("x")

    asyncio.run(main())


def test_what_is_wrong_is_raised_at_the_call_or_where_it_is_awaited(make_async: MakeAsync) -> None:
    engine = make_async(max_num_seqs=1, max_num_queued_reqs=1)

    async def main() -> list[object]:
        with pytest.raises(RequestError):
            engine.embed("")
        with pytest.raises(RequestError, match="maximum context length"):
            await engine.embed([5] * 513)
        with pytest.raises(RequestError, match="not there after"):
            await engine.embed(list(range(3, 300)), timeout=1e-9)
        handles = [engine.embed([5] * 500) for _ in range(50)]
        return await asyncio.gather(*handles, return_exceptions=True)

    outcomes = {type(outcome) for outcome in asyncio.run(main())}
    assert outcomes == {EmbeddingOutput, QueueFullError}


def test_close_ends_it(make_async: MakeAsync) -> None:
    engine = make_async(max_num_batched_tokens=1)

    async def main() -> EmbeddingOutput:
        handle = engine.embed(list(range(3, 300)))
        engine.close()
        return await handle

    assert asyncio.run(main()).finish_reason == "abort"
