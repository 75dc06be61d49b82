"""AsyncEngine: handles that are awaited, iterated, cancelled, shared between loops, or never read."""

from __future__ import annotations

import asyncio
import gc
import itertools
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvpage import (
    AsyncEngine,
    Engine,
    EngineDeadError,
    QueueFullError,
    RequestError,
    SamplingParams,
    TokenEvent,
)

GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
ENDLESS = GREEDY.clone(max_tokens=500)
PROMPTS = ["The block pool", "Every request ends in exactly one", "Paged", "hands out blocks, and the"] * 4
MakeAsync = Callable[..., AsyncEngine]


@pytest.fixture(scope="module")
def expected(tiny: Path) -> dict[str, str]:
    """The text that a synchronous engine gives each prompt."""
    with Engine(tiny) as engine:
        return {o.prompt or "": o.outputs[0].text for o in engine.generate(PROMPTS, GREEDY)}


async def until(condition: Callable[[], bool]) -> None:
    """Wait for what the engine's thread will do soon."""
    for _ in range(2000):
        if condition():
            return
        await asyncio.sleep(0.002)
    raise AssertionError("it never happened")


def idle(engine: AsyncEngine) -> bool:
    stats = engine.stats()
    return (stats.running, stats.waiting, stats.used_blocks) == (0, 0, 0)


def test_many_awaited_at_once_give_what_the_engine_gives(
    make_async: MakeAsync, expected: dict[str, str]
) -> None:
    engine = make_async()

    async def main() -> list[Any]:
        return await asyncio.gather(*(engine.generate(prompt, GREEDY) for prompt in PROMPTS))

    outputs = asyncio.run(main())
    assert [output.prompt for output in outputs] == PROMPTS
    assert [output.outputs[0].text for output in outputs] == [expected[prompt] for prompt in PROMPTS]


def test_iterating_yields_the_events_of_the_whole(make_async: MakeAsync, expected: dict[str, str]) -> None:
    engine = make_async()

    async def read(prompt: str) -> list[TokenEvent]:
        handle = engine.generate(prompt, GREEDY.clone(logprobs=0))
        return [event async for event in handle]

    async def main() -> list[list[TokenEvent]]:
        return await asyncio.gather(*map(read, PROMPTS))

    for prompt, events in zip(PROMPTS, asyncio.run(main()), strict=True):
        assert "".join(event.delta for event in events) == expected[prompt]
        assert [event.finish_reason is not None for event in events].count(True) == 1
        assert events[-1].finish_reason == "length"
        assert sum(len(event.token_ids) for event in events) == 12
        assert all(
            event.logprobs is not None and len(event.logprobs) == len(event.token_ids) for event in events
        )


def test_a_chat_is_answered(make_async: MakeAsync) -> None:
    engine = make_async()
    messages = [{"role": "user", "content": "blocks?"}]

    async def main() -> Any:
        return await engine.chat(messages, GREEDY)

    assert asyncio.run(main()).prompt == engine.render_chat(messages)


def test_a_slow_reader_gets_merged_events_and_the_end(
    make_async: MakeAsync, expected: dict[str, str]
) -> None:
    engine = make_async()

    async def main() -> list[TokenEvent]:
        events = []
        handle = engine.generate(PROMPTS[0], GREEDY)
        async for event in handle:
            events.append(event)
            # The whole rest is generated while the reader is busy, so nothing will wake it any more.
            await until(lambda: handle.done)
        return events

    events = asyncio.run(asyncio.wait_for(main(), 30))
    assert len(events) <= 2
    assert "".join(event.delta for event in events) == expected[PROMPTS[0]]


@pytest.mark.parametrize("pause", [0.0, 0.0005, 0.002])
def test_readers_of_any_pace_see_everything_once(
    make_async: MakeAsync, expected: dict[str, str], pause: float
) -> None:
    engine = make_async()

    async def read(prompt: str) -> str:
        text = ""
        async for event in engine.generate(prompt, GREEDY):
            text += event.delta
            await asyncio.sleep(pause)
        return text

    async def main() -> list[str]:
        return await asyncio.wait_for(asyncio.gather(*map(read, PROMPTS)), 30)

    assert asyncio.run(main()) == [expected[prompt] for prompt in PROMPTS]


def test_a_loop_is_called_at_most_once_a_step(make_async: MakeAsync, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_async()
    calls = []

    async def main() -> None:
        loop = asyncio.get_running_loop()
        wake = loop.call_soon_threadsafe
        monkeypatch.setattr(loop, "call_soon_threadsafe", lambda *a: (calls.append(a), wake(*a))[1])
        await asyncio.gather(*(engine.generate(prompt, GREEDY) for prompt in PROMPTS))

    asyncio.run(main())
    assert 0 < len(calls) <= engine.stats().steps


def test_a_handle_can_be_awaited_and_iterated_again(make_async: MakeAsync) -> None:
    engine = make_async()

    async def main() -> None:
        handle = engine.generate(PROMPTS[0], GREEDY)
        first, second = await asyncio.gather(handle.result(), handle.result())
        assert first is second is await handle is handle.output
        assert [event.finish_reason async for event in handle] == ["length"]
        assert [event async for event in handle] == []

    asyncio.run(main())


def test_a_handle_that_nobody_reads_runs_to_its_end(make_async: MakeAsync, expected: dict[str, str]) -> None:
    engine = make_async()
    handle = engine.generate(PROMPTS[0], GREEDY)
    engine.generate(PROMPTS[1], GREEDY)

    async def main() -> None:
        await until(lambda: handle.done and idle(engine))

    asyncio.run(main())
    assert handle.output.outputs[0].text == expected[PROMPTS[0]]
    assert engine.stats().finished_requests == 2


def test_leaving_the_loop_aborts_and_frees(make_async: MakeAsync) -> None:
    engine = make_async()

    async def main() -> None:
        handle = engine.generate(PROMPTS[0], ENDLESS)
        async for event in handle:
            assert event.finish_reason is None
            break
        await until(lambda: idle(engine))
        assert handle.output.outputs[0].finish_reason == "abort"

    asyncio.run(main())


def test_cancelling_a_task_aborts_its_request(make_async: MakeAsync) -> None:
    engine = make_async()

    async def reads(handle: Any) -> None:
        async for _ in handle:
            pass

    async def main() -> None:
        for wait in (lambda handle: handle.result(), reads):
            handle = engine.generate(PROMPTS[0], ENDLESS)
            task = asyncio.create_task(wait(handle))
            await until(lambda handle=handle: bool(handle.output.outputs[0].token_ids))  # type: ignore[misc]
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await until(lambda: idle(engine))
            assert handle.output.outputs[0].finish_reason == "abort"

    asyncio.run(main())


def test_wait_for_aborts_what_takes_too_long(make_async: MakeAsync) -> None:
    engine = make_async()

    async def main() -> None:
        handle = engine.generate(PROMPTS[0], ENDLESS)
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(handle, 0.01)
        await until(lambda: idle(engine))
        assert handle.done

    asyncio.run(main())


def test_aclose_returns_when_the_blocks_are_free(make_async: MakeAsync) -> None:
    engine = make_async()

    async def main() -> None:
        handle = engine.generate(PROMPTS[0], ENDLESS)
        await until(lambda: bool(handle.output.outputs[0].token_ids))
        await handle.aclose()
        assert idle(engine)
        output = await handle
        assert output.outputs[0].finish_reason == "abort"
        await handle.aclose()

    asyncio.run(main())


def test_the_end_of_async_with_aborts(make_async: MakeAsync) -> None:
    engine = make_async()

    async def main() -> None:
        async with engine.generate(PROMPTS[0], ENDLESS) as handle:
            async for _ in handle:
                break
        assert idle(engine)
        assert handle.output.outputs[0].finish_reason == "abort"

    asyncio.run(main())


def test_abort_by_id_and_cancel_from_any_thread(make_async: MakeAsync) -> None:
    engine = make_async()

    async def main() -> None:
        first = engine.generate(PROMPTS[0], ENDLESS, request_id="first")
        second = engine.generate(PROMPTS[0], ENDLESS)
        for end in (lambda: engine.abort("first"), second.cancel, lambda: engine.abort("unknown")):
            thread = threading.Thread(target=end)
            thread.start()
            thread.join()
        reasons = [output.outputs[0].finish_reason for output in await asyncio.gather(first, second)]
        assert reasons == ["abort", "abort"]

    asyncio.run(main())


def test_a_refused_id_leaves_its_owner_alone(make_async: MakeAsync) -> None:
    engine = make_async()

    async def main() -> None:
        owner = engine.generate(PROMPTS[0], GREEDY.clone(max_tokens=100), request_id="mine")
        waiting = asyncio.create_task(owner.result())
        await until(lambda: bool(owner.output.outputs[0].token_ids))
        thief = engine.generate(PROMPTS[0], GREEDY, request_id="mine")
        thief.cancel()
        with pytest.raises(RequestError, match="'mine' is in use"):
            await thief
        output = await asyncio.wait_for(waiting, 30)
        assert (output.outputs[0].finish_reason, len(output.outputs[0].token_ids)) == ("length", 100)

    asyncio.run(main())


def test_two_event_loops_in_two_threads_share_an_engine(
    make_async: MakeAsync, expected: dict[str, str]
) -> None:
    engine = make_async()
    found: dict[int, list[str]] = {}

    async def main() -> list[str]:
        outputs = await asyncio.gather(*(engine.generate(prompt, GREEDY) for prompt in PROMPTS))
        return [output.outputs[0].text for output in outputs]

    def work(index: int) -> None:
        found[index] = asyncio.run(main())

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {index: [expected[prompt] for prompt in PROMPTS] for index in range(2)}


def test_a_loop_that_is_blocked_does_not_hold_up_another(make_async: MakeAsync) -> None:
    engine = make_async()
    answers: list[str] = []

    async def ask() -> None:
        answers.append((await engine.generate(PROMPTS[0], GREEDY)).outputs[0].text)

    async def main() -> None:
        endless = engine.generate(PROMPTS[1], ENDLESS)
        async for _ in endless:
            break_off = threading.Thread(target=lambda: asyncio.run(ask()))
            break_off.start()
            break_off.join(timeout=60)  # this loop hands out nothing meanwhile
            break
        endless.cancel()

    asyncio.run(main())
    assert len(answers) == 1


def test_a_reader_that_keeps_up_gets_its_tokens_one_by_one(make_async: MakeAsync) -> None:
    engine = make_async()
    executor = engine._worker.core._executor
    assert executor is not None
    submit = executor.submit

    def unhurried(plan: Any) -> Any:
        """A step takes as long as that of a model which has something to say."""
        time.sleep(0.002)
        return submit(plan)

    executor.submit = unhurried

    async def main() -> list[int]:
        return [
            len(event.token_ids) async for event in engine.generate(PROMPTS[0], ENDLESS) if event.token_ids
        ]

    counts = asyncio.run(main())
    assert sum(counts) == ENDLESS.max_tokens
    assert counts.count(1) > 0.9 * len(counts)


def test_what_a_thread_without_loop_submits_a_loop_can_await(make_async: MakeAsync) -> None:
    engine = make_async()
    handles = []
    thread = threading.Thread(target=lambda: handles.append(engine.generate(PROMPTS[0], GREEDY)))
    thread.start()
    thread.join()

    async def main() -> Any:
        return await handles[0]

    assert asyncio.run(main()).outputs[0].finish_reason == "length"


def test_a_loop_that_is_gone_takes_its_requests_along(make_async: MakeAsync) -> None:
    engine = make_async()
    handles = []

    async def abandons() -> None:
        handles.append(engine.generate(PROMPTS[0], ENDLESS))
        watching = asyncio.ensure_future(handles[0]._changed())
        await watching

    loop = asyncio.new_event_loop()
    loop.run_until_complete(abandons())
    loop.close()
    asyncio.run(until(lambda: handles[0].done and idle(engine)))
    assert handles[0].output.outputs[0].finish_reason == "abort"


def test_a_handle_belongs_to_one_loop_at_a_time(make_async: MakeAsync) -> None:
    engine = make_async()
    handle = engine.generate(PROMPTS[0], ENDLESS)
    events = handle.__aiter__()
    first, second = asyncio.new_event_loop(), asyncio.new_event_loop()
    assert first.run_until_complete(events.__anext__()).token_ids
    with pytest.raises(RuntimeError, match="another event loop"):
        second.run_until_complete(handle.result())
    first.run_until_complete(events.aclose())  # type: ignore[attr-defined]
    first.close()
    assert second.run_until_complete(handle.result()).outputs[0].finish_reason == "abort"
    second.close()


def test_bad_prompts_are_refused_at_the_call(make_async: MakeAsync) -> None:
    engine = make_async()
    for prompt in ("", [999], [[1]], None):
        with pytest.raises(RequestError):
            engine.generate(prompt)  # type: ignore[arg-type]


def test_what_only_the_engine_can_tell_is_raised_where_it_is_awaited(make_async: MakeAsync) -> None:
    engine = make_async(max_num_seqs=1, max_num_queued_reqs=1)

    async def main() -> None:
        with pytest.raises(RequestError, match="maximum context length"):
            await engine.generate([7] * 600, GREEDY)
        with pytest.raises(RequestError, match="maximum context length"):
            async for _ in engine.generate([7] * 600, GREEDY):
                pass
        running = engine.generate(PROMPTS[0], ENDLESS)
        await until(lambda: engine.stats().running == 1)
        waiting = engine.generate(PROMPTS[0], GREEDY)
        refused = engine.generate(PROMPTS[0], GREEDY)
        with pytest.raises(QueueFullError):
            await refused
        assert refused.done
        running.cancel()
        assert (await waiting).outputs[0].finish_reason == "length"

    asyncio.run(main())


def test_a_timeout_ends_running_and_waiting_requests(make_async: MakeAsync) -> None:
    engine = make_async(max_num_seqs=1)

    async def main() -> None:
        slow = ENDLESS.clone(timeout=0.05)
        outputs = await asyncio.gather(*(engine.generate(PROMPTS[0], slow) for _ in range(2)))
        for output in outputs:
            choice = output.outputs[0]
            assert (choice.finish_reason, choice.stop_reason) == ("length", "timeout")

    asyncio.run(main())


def test_a_storm_of_readers_and_aborts_ends_every_choice_once(make_async: MakeAsync) -> None:
    engine = make_async(num_kv_blocks=40, block_size=4, max_num_seqs=16)

    async def one(index: int) -> int:
        params = SamplingParams(
            n=1 + index % 3, temperature=1.0, max_tokens=5 + index % 30, seed=index, stop=["e", "th"]
        )
        handle = engine.generate([5 + index % 300] * (1 + index % 20), params)
        if index % 7 == 0:
            await asyncio.sleep(0.001 * (index % 11))
            handle.cancel()
        ends = [event.index async for event in handle if event.finish_reason is not None]
        assert sorted(ends) == list(range(params.n))
        return len(ends)

    async def main() -> int:
        return sum(await asyncio.wait_for(asyncio.gather(*map(one, range(300))), 60))

    assert asyncio.run(main()) == sum(1 + index % 3 for index in range(300))
    assert engine.stats().finished_requests == 300
    assert idle(engine)


def test_numbers_and_maps_can_be_asked_for_from_any_thread(make_async: MakeAsync) -> None:
    engine = make_async()
    handle = engine.generate(PROMPTS[0], ENDLESS, request_id="shown")
    maps = []
    while not maps or "shown" not in maps[-1]:
        maps.append(engine.inspect().to_text())
    assert engine.stats().running == 1
    assert engine.reset_prefix_cache() is False
    engine.check_health()
    handle.cancel()


def test_drain_waits_for_open_requests_and_takes_no_more(make_async: MakeAsync) -> None:
    engine = make_async()

    async def main() -> None:
        handles = [engine.generate(prompt, GREEDY.clone(max_tokens=60)) for prompt in PROMPTS]
        assert await engine.drain(timeout=0.0) is False
        with pytest.raises(EngineDeadError, match="draining"):
            engine.generate(PROMPTS[0], GREEDY)
        assert await engine.drain() is True
        assert all(handle.done for handle in handles)
        assert {handle.output.outputs[0].finish_reason for handle in handles} == {"length"}

    asyncio.run(main())


def test_closing_aborts_open_requests_and_wakes_their_readers(make_async: MakeAsync) -> None:
    async def main(close: Callable[[AsyncEngine], Any]) -> None:
        engine = make_async(max_num_seqs=2)
        handles = [engine.generate(prompt, ENDLESS) for prompt in PROMPTS]
        tasks = [asyncio.create_task(handle.result()) for handle in handles]
        await until(lambda: engine.stats().running == 2)
        closing = close(engine)
        if closing is not None:
            await closing
        outputs = await asyncio.wait_for(asyncio.gather(*tasks), 30)
        assert {output.outputs[0].finish_reason for output in outputs} == {"abort"}
        for use in (lambda: engine.generate("x"), engine.check_health, engine.stats):
            with pytest.raises(EngineDeadError, match="closed"):
                use()
        handles[0].cancel()
        engine.abort("anything")
        engine.close()
        await engine.aclose()
        assert await engine.drain() is True

    asyncio.run(main(lambda engine: engine.aclose()))
    asyncio.run(main(lambda engine: engine.close()))


def test_async_with_closes_the_engine(tiny: Path) -> None:
    async def main() -> AsyncEngine:
        async with AsyncEngine(tiny) as engine:
            await engine.generate("x", GREEDY)
        return engine

    engine = asyncio.run(main())
    assert not engine._worker.alive
    with pytest.raises(EngineDeadError):
        engine.check_health()


def test_cancelling_while_the_engine_closes_still_cancels(make_async: MakeAsync) -> None:
    engine = make_async()

    async def main() -> None:
        task = asyncio.create_task(engine.generate(PROMPTS[0], ENDLESS).result())
        await until(lambda: engine.stats().running == 1)
        engine._worker.request_stop()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())


def kvpage_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("kvpage")]


def test_dropping_an_engine_ends_its_thread(tiny: Path) -> None:
    before = kvpage_threads()
    engine = AsyncEngine(tiny)
    (thread,) = (thread for thread in kvpage_threads() if thread not in before)
    engine.generate("x", ENDLESS)
    gone = weakref.ref(engine)
    del engine
    gc.collect()
    assert gone() is None
    thread.join(10)
    assert not thread.is_alive()


def test_a_request_keeps_its_engine_alive(tiny: Path) -> None:
    async def main() -> Any:
        return await AsyncEngine(tiny).generate("x", GREEDY)

    assert asyncio.run(main()).outputs[0].finish_reason == "length"
    gc.collect()


def test_an_engine_works_whichever_thread_made_it(tiny: Path) -> None:
    made: list[Any] = []

    def make() -> None:
        engine = AsyncEngine(tiny)
        made.append((engine, asyncio.run(engine.generate("x", GREEDY).result())))
        with Engine(tiny) as synchronous:
            made.append(synchronous.generate("x", GREEDY)[0])

    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
    (engine, output), expected = made
    assert output.outputs[0].token_ids == expected.outputs[0].token_ids
    assert asyncio.run(engine.generate("x", GREEDY).result()).outputs[0].text == output.outputs[0].text
    engine.close()


def test_two_async_engines_run_side_by_side(make_async: MakeAsync, tiny: Path, tmp_path: Path) -> None:
    from tiny_checkpoint import write_checkpoint

    other = write_checkpoint(tmp_path / "other", seed=9, num_hidden_layers=3)
    alone = {}
    for folder in (tiny, other):
        with Engine(folder) as engine:
            alone[folder] = [o.outputs[0].token_ids for o in engine.generate(PROMPTS, GREEDY)]
    engines = {folder: make_async(folder) for folder in (tiny, other)}

    async def main() -> dict[Path, list[list[int]]]:
        pairs = list(itertools.product(engines, PROMPTS))
        outputs = await asyncio.gather(
            *(engines[folder].generate(prompt, GREEDY) for folder, prompt in pairs)
        )
        found: dict[Path, list[list[int]]] = {}
        for (folder, _), output in zip(pairs, outputs, strict=True):
            found.setdefault(folder, []).append(output.outputs[0].token_ids)
        return found

    assert asyncio.run(main()) == alone
    assert alone[tiny] != alone[other]


def test_the_event_loop_stays_responsive_while_the_engine_works(make_async: MakeAsync) -> None:
    engine = make_async()

    async def main() -> int:
        handle = engine.generate(PROMPTS[0], ENDLESS)
        turns = 0
        while not handle.done:
            await asyncio.sleep(0)
            turns += 1
            if turns > 100:
                handle.cancel()
                await handle
        return turns

    assert asyncio.run(main()) > 100
