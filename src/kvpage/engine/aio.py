"""AsyncEngine: one thread owns the core; asyncio code submits from its loop and is woken once a step."""

from __future__ import annotations

import asyncio
import time
import weakref
from collections.abc import AsyncIterator, Generator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from kvpage.config import EngineOptions
from kvpage.engine.build import build_engine
from kvpage.engine.inputs import Message, Prompt
from kvpage.engine.request import GenerationState, OutputT, RequestState
from kvpage.engine.stats import EngineStats
from kvpage.engine.thread import CoreThread, Loop
from kvpage.errors import EngineDeadError
from kvpage.metrics import MetricsSnapshot
from kvpage.outputs import EmbeddingOutput, RequestOutput, TokenEvent
from kvpage.params import Pooling, SamplingParams
from kvpage.plugins import PluginRegistry
from kvpage.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from kvpage.inspect.snapshot import BlockMap


SelfT = TypeVar("SelfT", bound="AsyncRequest[Any]")


class AsyncRequest(Generic[OutputT]):
    """One request of an ``AsyncEngine``, whatever it asks for: await it for the whole output.

    Bound to the event loop that first awaits it. Cancelling a task that awaits it, ``aclose()`` and the end of
    ``async with handle`` cancel the request.
    """

    def __init__(self, engine: AsyncEngine, worker: CoreThread, state: RequestState[OutputT]) -> None:
        # As long as somebody holds a request of it, an engine is not dropped.
        self._engine, self._worker, self._state = engine, worker, state
        self.loop: Loop | None = None
        self._waiters: list[asyncio.Future[None]] = []

    @property
    def request_id(self) -> str:
        return self._state.output.request_id

    @property
    def done(self) -> bool:
        """Whether every choice has ended, in whatever way."""
        return self._state.done

    @property
    def output(self) -> OutputT:
        """The output so far; it grows in place."""
        return self._state.output

    def cancel(self) -> None:
        """End the request; unfinished choices get finish_reason "abort". Callable from any thread."""
        if not self._state.done:
            self._worker.abort(self._state)

    async def aclose(self) -> None:
        """Cancel the request and wait until its blocks are free."""
        self.cancel()
        while not self._state.done:
            await self._changed()

    async def result(self) -> OutputT:
        """The whole output; after a cancel with what was generated until then.

        Raises:
            KvpageError: what ended the request in error.
        """
        try:
            while not self._state.done:
                await self._changed()
        except asyncio.CancelledError:
            self.cancel()
            raise
        if self._state.error is not None:
            raise self._state.error
        return self._state.output

    def __await__(self) -> Generator[Any, None, OutputT]:
        return self.result().__await__()

    async def __aenter__(self: SelfT) -> SelfT:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def _changed(self) -> None:
        """Until the engine's thread says that this request gained something (or at once, if it just did)."""
        loop = asyncio.get_running_loop()
        if self.loop is not loop:
            if self.loop is not None and not self.loop.is_closed():
                raise RuntimeError(
                    "this handle is read in another event loop, which first awaited or iterated it: "
                    "read it there"
                )
            self.unbind()
            self.loop = loop
            self._worker.watch(self._state, self)
            return
        waiter: asyncio.Future[None] = loop.create_future()
        self._waiters.append(waiter)
        try:
            await waiter
        finally:
            if waiter in self._waiters:
                self._waiters.remove(waiter)

    def unbind(self) -> None:
        """The loop is gone, and with it whoever waited there."""
        self.loop = None
        self._waiters = []

    def wake(self) -> None:
        """In the handle's loop: whoever waits looks again."""
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)


class AsyncHandle(AsyncRequest[RequestOutput]):
    """A request that gains tokens: await it for the whole output, or iterate it for TokenEvents.

    Leaving an ``async for`` early cancels it too. Events that nobody has read yet are merged, so a slow reader
    costs no memory.
    """

    def __init__(self, engine: AsyncEngine, worker: CoreThread, state: GenerationState) -> None:
        super().__init__(engine, worker, state)
        self._generation = state

    def __aiter__(self) -> AsyncIterator[Any]:
        return self._events()

    async def _events(self) -> AsyncIterator[TokenEvent]:
        try:
            while True:
                done = self.done
                events = self._generation.take_events()
                for event in events:
                    yield event
                if done:
                    break
                # Whatever came while the reader was busy woke nobody, so only an empty look is followed by a wait.
                if not events:
                    await self._changed()
        finally:
            self.cancel()
        if self._state.error is not None:
            raise self._state.error


class AsyncEngine:
    """An LLM engine in your process, for asyncio. Arguments and errors are those of ``Engine``.

    Every method that is no coroutine may be called from any thread, several event loops included.
    """

    def __init__(self, model: Any = "demo", *, plugins: PluginRegistry | None = None, **options: Any) -> None:
        self.options = EngineOptions.from_keywords(model=model, **options)
        parts = build_engine(self.options, plugins)
        self._inputs = parts.inputs
        self._config = parts.config
        self._worker = CoreThread(parts.core)
        self._draining = False
        # Ends the thread when the engine is dropped or the interpreter exits without close().
        self._finalizer = weakref.finalize(self, self._worker.stop)

    @property
    def tokenizer(self) -> Tokenizer | None:
        return self._inputs.tokenizer

    @property
    def config(self) -> Any:
        """``kvpage.config.Resolved``: every value the engine runs with, and the reason of each."""
        return self._config

    def generate(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
        cache_salt: str | None = None,
    ) -> AsyncHandle:
        """Submit a request; await the handle for the RequestOutput, or iterate it for TokenEvents.

        Raises:
            RequestError: prompt or parameters cannot be served. What only the engine can tell (queue full,
                never fits) is raised where the handle is awaited or iterated.
            EngineDeadError: the engine is closed, or draining.
        """
        make = self._inputs.request
        return self._submit(
            make(prompt, params, request_id=request_id, priority=priority, cache_salt=cache_salt)
        )

    def chat(
        self,
        messages: Sequence[Message],
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
        cache_salt: str | None = None,
        **template_options: Any,
    ) -> AsyncHandle:
        """``generate`` for a conversation, written out by the model's chat template."""
        return self._submit(
            self._inputs.chat_request(
                messages,
                params,
                request_id=request_id,
                priority=priority,
                cache_salt=cache_salt,
                **template_options,
            )
        )

    def embed(
        self,
        prompt: Prompt,
        *,
        pooling: Pooling = "mean",
        normalize: bool = True,
        timeout: float | None = None,
        request_id: str | None = None,
        priority: int = 0,
        cache_salt: str | None = None,
    ) -> AsyncRequest[EmbeddingOutput]:
        """The vector of one prompt, as ``Engine.embed``: submitted at this call; await the handle for it.

        Raises:
            RequestError, EngineDeadError: as ``generate``.
        """
        state = self._inputs.embedding(
            prompt, pooling=pooling, normalize=normalize, timeout=timeout, request_id=request_id,
            priority=priority, cache_salt=cache_salt,
        )  # fmt: skip
        self._check_open()
        handle = AsyncRequest(self, self._worker, state)
        self._worker.submit(state)
        return handle

    def render_chat(self, messages: Sequence[Message], **template_options: Any) -> str:
        """The prompt text that ``chat`` would send; ``chat_template=`` gives a template for this one call."""
        return self._inputs.render_chat(messages, **template_options)

    def abort(self, request_id: str) -> None:
        """Cancel a request by id; unknown ids are ignored."""
        self._worker.abort_id(request_id)

    def stats(self) -> EngineStats:
        """Counts between two steps (waits for the running step to end)."""
        return self._worker.call(lambda core: core.stats()).result()

    def metrics(self) -> MetricsSnapshot:
        """All that was counted and measured since the engine was made (waits for the running step to end).

        After the engine's end too, so that a last look tells how it ended.
        """
        try:
            return self._worker.call(lambda core: core.metrics()).result()
        except EngineDeadError:
            return self._worker.core.metrics()

    def inspect(self) -> BlockMap:
        """The block map between two steps; ``.to_text()``, ``.to_svg()``."""
        from kvpage.inspect.snapshot import map_blocks  # drawn on demand, in the caller's thread

        return map_blocks(self._worker.call(lambda core: core.scheduler.snapshot()).result())

    def reset_prefix_cache(self) -> bool:
        """Forget all cached prefixes; ``False`` (and nothing done) while requests hold blocks."""
        return self._worker.call(lambda core: core.blocks.reset_prefix_cache()).result()

    def check_health(self) -> None:
        """Raises EngineDeadError if the engine is closed or a step failed. Never waits for a step."""
        if not self._finalizer.alive:
            raise EngineDeadError("the engine is closed; make a new one")
        self._worker.core.check_alive()

    async def drain(self, timeout: float | None = None) -> bool:
        """Take no more requests and wait until the open ones have ended; ``False`` if ``timeout`` seconds did
        not suffice (they go on)."""
        self._draining = True
        deadline = None if timeout is None else time.monotonic() + timeout
        while await self._open_requests():
            if deadline is not None and time.monotonic() > deadline:
                return False
            await asyncio.sleep(0.01)
        return True

    def close(self) -> None:
        """Abort what is unfinished, end the thread, give all memory back. Idempotent; waits for the running step."""
        self._finalizer()

    async def aclose(self) -> None:
        """``close`` without blocking the event loop."""
        self._worker.request_stop()
        while self._worker.alive:
            await asyncio.sleep(0.002)
        self.close()

    async def __aenter__(self) -> AsyncEngine:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def _open_requests(self) -> int:
        """Requests that have not ended, those on their way to the engine's thread included."""
        try:
            counting = self._worker.call(lambda core: len(core.states))
        except EngineDeadError:
            return 0
        return await asyncio.wrap_future(counting)

    def _submit(self, state: GenerationState) -> AsyncHandle:
        self._check_open()
        handle = self._make_handle(state)
        self._worker.submit(state)
        return handle

    def _check_open(self) -> None:
        self.check_health()
        if self._draining:
            raise EngineDeadError("the engine is draining and takes no more requests")

    def _make_handle(self, state: GenerationState) -> AsyncHandle:
        return AsyncHandle(self, self._worker, state)
