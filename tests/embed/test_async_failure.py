"""An AsyncEngine whose step fails, whose plugins fail, or whose thread is asked from within."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest

from kvpage import AsyncEngine, EngineDeadError, PluginRegistry, RequestError, SamplingParams, hookimpl
from kvpage.api.events import EventListener, StepStats
from kvpage.api.records import EventListenerRecord
from kvpage.text.detokenizer import Detokenizer

GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
MakeAsync = Callable[..., AsyncEngine]


def fail_step(
    engine: AsyncEngine, error: BaseException, count: int, armed: threading.Event | None = None
) -> None:
    """The executor raises at its ``count``-th step, or later when it is ``armed``."""
    executor = engine._worker.core._executor
    assert executor is not None
    submit, left = executor.submit, [count]

    def failing(plan: Any) -> Any:
        left[0] -= 1
        if left[0] <= 0 and (armed is None or armed.is_set()):
            raise error
        return submit(plan)

    executor.submit = failing  # type: ignore[method-assign]


@pytest.mark.parametrize("error", [ValueError("boom"), MemoryError("boom")], ids=lambda e: type(e).__name__)
def test_a_failed_step_reaches_every_handle(
    tiny: Path, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    engine = AsyncEngine(tiny, max_num_seqs=4)
    armed = threading.Event()
    fail_step(engine, error, 5, armed)

    async def iterate(handle: Any) -> list[Any]:
        return [event async for event in handle]

    async def main() -> list[Any]:
        handles = [engine.generate("The block", GREEDY.clone(max_tokens=500)) for _ in range(8)]
        armed.set()
        ways = [handle.result() if index % 2 else iterate(handle) for index, handle in enumerate(handles)]
        return await asyncio.wait_for(asyncio.gather(*ways, return_exceptions=True), 30)

    found = asyncio.run(main())
    assert [type(outcome) for outcome in found] == [EngineDeadError] * 8
    assert all(outcome.__cause__ is error for outcome in found)
    assert "the engine died" in caplog.text
    assert caplog.records[-1].levelno == logging.ERROR
    for use in (engine.check_health, lambda: engine.generate("x")):
        with pytest.raises(EngineDeadError, match="boom"):
            use()
    assert engine.stats().used_blocks == 0
    thread = engine._worker._thread
    assert thread.is_alive()
    engine.close()
    assert not thread.is_alive()


def test_whatever_ends_the_thread_ends_its_requests(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = AsyncEngine(tiny)
    monkeypatch.setattr(threading, "excepthook", lambda args: None)
    fail_step(engine, SystemExit(3), 3)

    async def main() -> None:
        handle = engine.generate("The block", GREEDY)
        with pytest.raises(EngineDeadError):
            await asyncio.wait_for(handle.result(), 30)

    asyncio.run(main())
    engine._worker._thread.join(10)
    assert not engine._worker.alive
    for use in (engine.check_health, lambda: engine.generate("x")):
        with pytest.raises(EngineDeadError):
            use()
    engine.close()


def test_a_fault_of_the_scheduler_at_submission_is_the_requests(
    make_async: MakeAsync, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_async()
    core = engine._worker.core

    async def main() -> None:
        with monkeypatch.context() as patch:
            patch.setattr(core.scheduler, "submit", lambda request: 1 // 0)
            with pytest.raises(ZeroDivisionError):
                await asyncio.wait_for(engine.generate("x", GREEDY).result(), 30)
        assert (await engine.generate("x", GREEDY)).outputs[0].finish_reason == "length"

    asyncio.run(main())


def test_a_terminal_event_comes_before_the_error(tiny: Path) -> None:
    engine = AsyncEngine(tiny)
    fail_step(engine, ValueError("boom"), 4)
    events: list[Any] = []

    async def main() -> None:
        async for event in engine.generate("The block", GREEDY.clone(n=2, temperature=1.0)):
            events.append(event)

    with pytest.raises(EngineDeadError):
        asyncio.run(main())
    ends = [(event.index, event.finish_reason) for event in events if event.finish_reason is not None]
    assert sorted(ends) == [(0, "error"), (1, "error")]
    assert sum(len(event.token_ids) for event in events) == 6
    engine.close()


class Curious(EventListener):
    """Asks its engine for numbers, and ends a request, from within the engine's thread."""

    engines: ClassVar[list[AsyncEngine]] = []
    seen: ClassVar[list[int]] = []

    def step(self, stats: StepStats) -> None:
        for engine in self.engines:
            self.seen.append(engine.stats().running)
            if len(self.seen) == 3:
                engine.abort("shy")


class CuriousPlugin:
    @hookimpl
    def kvpage_event_listeners(self) -> list[EventListenerRecord]:
        return [EventListenerRecord(name="curious", factory=f"{__name__}:Curious")]


def test_a_listener_may_ask_the_engine_it_listens_to(make_async: MakeAsync) -> None:
    engine = make_async(plugins=PluginRegistry(plugins=[CuriousPlugin()], entry_points=False, strict=True))
    Curious.seen.clear()
    Curious.engines[:] = [engine]

    async def main() -> Any:
        return await asyncio.wait_for(engine.generate("x", GREEDY, request_id="shy").result(), 30)

    output = asyncio.run(main())
    Curious.engines.clear()
    assert output.outputs[0].finish_reason == "abort"
    assert Curious.seen[:3] == [1, 1, 1]


class Faulty:
    """A plugin whose hook fails: the engine starts without it unless the registry is strict."""

    @hookimpl
    def kvpage_event_listeners(self) -> list[EventListenerRecord]:
        raise RuntimeError("boom")


def test_a_broken_plugin_is_listed_and_the_engine_starts(make_async: MakeAsync) -> None:
    registry = PluginRegistry(plugins=[Faulty()], entry_points=False)
    engine = make_async(plugins=registry)
    assert [status.status for status in registry.statuses()] == ["active", "failed"]

    async def main() -> Any:
        return await engine.generate("x", GREEDY)

    assert asyncio.run(main()).outputs[0].finish_reason == "length"


def test_one_request_in_error_leaves_the_others(
    make_async: MakeAsync, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_async()
    broken: list[Detokenizer] = []

    def push(self: Detokenizer, ids: Sequence[int]) -> str:
        """Fails for the first that has a token."""
        if not broken:
            broken.append(self)
        return str(1 // 0) if self is broken[0] else "x"

    monkeypatch.setattr(Detokenizer, "push", push)

    async def main() -> list[Any]:
        handles = [engine.generate("The block", GREEDY) for _ in range(2)]
        return await asyncio.gather(*handles, return_exceptions=True)

    failed, fine = sorted(asyncio.run(main()), key=lambda found: not isinstance(found, Exception))
    assert isinstance(failed, RequestError)
    assert "ZeroDivisionError" in str(failed)
    assert fine.outputs[0].finish_reason == "length"
