"""Engine: the synchronous face. No thread, no process, no port: work happens inside the calls."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic

from kvpage.config import EngineOptions
from kvpage.engine.build import EngineParts, build_engine
from kvpage.engine.core import EngineCore
from kvpage.engine.inputs import Message, Prompt
from kvpage.engine.request import EmbeddingState, GenerationState, OutputT, RequestState
from kvpage.engine.stats import EngineStats
from kvpage.errors import RequestError
from kvpage.metrics import MetricsSnapshot
from kvpage.outputs import EmbeddingOutput, RequestOutput, TokenEvent
from kvpage.params import Pooling, SamplingParams
from kvpage.plugins import PluginRegistry
from kvpage.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from kvpage.inspect.snapshot import BlockMap


class Handle(Generic[OutputT]):
    """One submitted request of an ``Engine``, whatever it asks for."""

    def __init__(self, engine: Engine, state: RequestState[OutputT]) -> None:
        self._engine, self._state = engine, state

    @property
    def request_id(self) -> str:
        return self._state.output.request_id

    @property
    def done(self) -> bool:
        """Whether every choice has ended, in whatever way."""
        return self._state.done

    @property
    def output(self) -> OutputT:
        """The output so far; it grows in place while the engine steps."""
        return self._state.output

    def cancel(self) -> None:
        """End the request now; unfinished choices get finish_reason "abort" and keep what was generated."""
        if not self.done:
            self._engine.abort(self.request_id)

    def result(self) -> OutputT:
        """Step the engine until this request has ended.

        Raises:
            KvpageError: what ended the request in error.
        """
        while not self.done:
            self._engine._advance(self)
        if self._state.error is not None:
            raise self._state.error
        return self._state.output


class RequestHandle(Handle[RequestOutput]):
    """A request that gains tokens."""

    def __init__(self, engine: Engine, state: GenerationState) -> None:
        super().__init__(engine, state)
        self._generation = state

    def events(self) -> list[TokenEvent]:
        """What each choice gained since the last call, at most one event a choice."""
        return self._generation.take_events()

    def __repr__(self) -> str:
        tokens = sum(len(choice.token_ids) for choice in self.output.outputs)
        return f"<RequestHandle {self.request_id}: {'done' if self.done else 'open'}, {tokens} tokens>"


class Engine:
    """An LLM engine in your process.

    Args:
        model: a folder, a hub id, "demo" (the bundled model), or an already loaded transformers model, whose
            weights are then shared.
        plugins: a PluginRegistry; by default one with every installed plugin.
        options: any field of ``kvpage.config.EngineOptions``, vLLM's names.

    Raises:
        ConfigError, CheckpointError, PluginError: nothing was started.

    Every method may be called from any thread; calls take turns.
    """

    def __init__(self, model: Any = "demo", *, plugins: PluginRegistry | None = None, **options: Any) -> None:
        self.options = EngineOptions.from_keywords(model=model, **options)
        self._parts: EngineParts = build_engine(self.options, plugins)
        self._lock = threading.RLock()

    @property
    def tokenizer(self) -> Tokenizer | None:
        return self._parts.inputs.tokenizer

    @property
    def config(self) -> Any:
        """``kvpage.config.Resolved``: every value the engine runs with, and the reason of each."""
        return self._parts.config

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        priority: Sequence[int] | None = None,
        progress: bool | None = None,
    ) -> list[RequestOutput]:
        """Complete every prompt; the order of results is the order of prompts.

        Args:
            prompts: one prompt or a list of them (a list of ints is one prompt of token ids).
            params: one SamplingParams for all, or one each.
            priority: one each (``scheduling_policy="priority"``; lower goes first).
            progress: show a progress bar; ``None`` = on a terminal.

        Raises:
            RequestError: a prompt cannot be served; none of them is then left in the engine.
        """
        listed = _as_prompts(prompts)
        each = _one_each("params", params, len(listed))
        priorities = _one_each("priority", priority, len(listed))
        make = self._parts.inputs.request
        return self._complete(
            [make(p, q, priority=r or 0) for p, q, r in zip(listed, each, priorities, strict=True)], progress
        )

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool | None = None,
        **template_options: Any,
    ) -> list[RequestOutput]:
        """Answer one conversation or several, written out by the model's chat template.

        ``template_options`` go to the template: ``tools``, ``add_generation_prompt``, ``enable_thinking`` ...
        """
        several = bool(messages) and not isinstance(messages[0], Mapping)
        conversations: Sequence[Any] = messages if several else [messages]
        each = _one_each("params", params, len(conversations))
        make = self._parts.inputs.chat_request
        return self._complete(
            [make(m, p, **template_options) for m, p in zip(conversations, each, strict=True)], progress
        )

    def embed(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        pooling: Pooling = "mean",
        normalize: bool = True,
        timeout: float | None = None,
        priority: Sequence[int] | None = None,
        cache_salt: str | None = None,
    ) -> list[EmbeddingOutput]:
        """One vector a prompt, of the model's hidden states after the final norm; the order is that of the prompts.

        A prompt may be as long as ``max_model_len``. It shares steps with whatever else the engine computes, which
        changes nothing of its vector; being computed in chunks, or again after a preemption, changes it by no more
        than the rounding of float32.

        Args:
            pooling: "mean" of all positions (takes no prefix hit), or the "last" one.
            normalize: scale to length 1.
            timeout: seconds; what has not ended then raises RequestError.
            priority: one each. cache_salt: for all; share KV prefixes only with requests of the same salt.

        Raises:
            RequestError: a prompt cannot be served; none of them is then left in the engine.
        """
        listed = _as_prompts(prompts)
        priorities = _one_each("priority", priority, len(listed))
        make = self._parts.inputs.embedding
        states = [
            make(
                p,
                pooling=pooling,
                normalize=normalize,
                timeout=timeout,
                priority=r or 0,
                cache_salt=cache_salt,
            )
            for p, r in zip(listed, priorities, strict=True)
        ]
        return self._run(self._submit_embedding(state) for state in states)

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[TokenEvent]:
        """Complete one prompt, yielding TokenEvents as tokens arrive; leaving the loop cancels the request."""
        return self._stream(self.submit(prompt, params))

    def stream_chat(
        self, messages: Sequence[Message], params: SamplingParams | None = None, **template_options: Any
    ) -> Iterator[TokenEvent]:
        """``stream`` for a conversation."""
        return self._stream(
            self._submit(self._parts.inputs.chat_request(messages, params, **template_options))
        )

    def submit(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
        cache_salt: str | None = None,
    ) -> RequestHandle:
        """Queue a request and return at once; ``step()`` or ``handle.result()`` do the work.

        Args:
            request_id: must differ from those of all live requests.
            cache_salt: share KV prefixes only with requests of the same salt.

        Raises:
            RequestError, QueueFullError, EngineDeadError: nothing was queued.
        """
        make = self._parts.inputs.request
        return self._submit(
            make(prompt, params, request_id=request_id, priority=priority, cache_salt=cache_salt)
        )

    def step(self) -> bool:
        """Run one step if there is work; whether there is more.

        Raises:
            EngineDeadError: the step failed as a whole; every request has ended with that error.
        """
        with self._lock:
            core = self._core
            core.check_alive()
            if core.has_work:
                core.step()
            return core.has_work

    def abort(self, request_id: str) -> None:
        """Cancel a request by id; unknown ids are ignored."""
        with self._lock:
            self._core.abort(request_id)

    def stats(self) -> EngineStats:
        """Counts of this moment."""
        with self._lock:
            return self._core.stats()

    def metrics(self) -> MetricsSnapshot:
        """All that was counted and measured since the engine was made; also after it is closed."""
        with self._lock:
            return self._core.metrics()

    def inspect(self) -> BlockMap:
        """The block map: which sequence holds which KV block; ``.to_text()``, ``.to_svg()``."""
        from kvpage.inspect.snapshot import take_snapshot  # the picture is drawn on demand

        with self._lock:
            return take_snapshot(self._core.scheduler)

    def render_chat(self, messages: Sequence[Message], **template_options: Any) -> str:
        """The prompt text that ``chat`` would send; ``chat_template=`` gives a template for this one call."""
        return self._parts.inputs.render_chat(messages, **template_options)

    def reset_prefix_cache(self) -> bool:
        """Forget all cached prefixes; ``False`` (and nothing done) while requests hold blocks."""
        with self._lock:
            return self._core.blocks.reset_prefix_cache()

    def close(self) -> None:
        """Abort what is unfinished and give all memory back. Idempotent."""
        with self._lock:
            self._core.close()

    def __repr__(self) -> str:
        config = self._parts.config
        state = "closed" if self._core.dead is not None else "open"
        return (
            f"<{type(self).__name__} {self.options.model!s:.60}: {state}, {config.dtype} on {config.device}>"
        )

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def _core(self) -> EngineCore:
        return self._parts.core

    def _submit(self, state: GenerationState) -> RequestHandle:
        with self._lock:
            self._core.submit(state)
        return RequestHandle(self, state)

    def _submit_embedding(self, state: EmbeddingState) -> Handle[EmbeddingOutput]:
        with self._lock:
            self._core.submit(state)
        return Handle(self, state)

    def _advance(self, handle: Handle[Any]) -> None:
        """One step, unless another thread has meanwhile ended the request (or closed the engine)."""
        with self._lock:
            if not handle.done:
                self.step()

    def _stream(self, handle: RequestHandle) -> Iterator[TokenEvent]:
        try:
            while not handle.done:
                self._advance(handle)
                yield from handle.events()
            yield from handle.events()
            handle.result()
        finally:
            if not handle.done:
                handle.cancel()

    def _complete(self, states: Sequence[GenerationState], progress: bool | None) -> list[RequestOutput]:
        show = sys.stderr.isatty() if progress is None else progress
        submitted = (self._submit(state) for state in states)
        return self._run(submitted, self._drive_with_progress if show else None)

    def _run(
        self,
        submitted: Iterable[Handle[OutputT]],
        drive: Callable[[Sequence[Any]], None] | None = None,
    ) -> list[OutputT]:
        """Submit all or none, by drawing them from ``submitted``; then step until all have ended."""
        handles: list[Handle[OutputT]] = []
        try:
            handles += submitted
            if drive is not None:
                drive(handles)
            return [handle.result() for handle in handles]
        finally:
            for handle in handles:
                if not handle.done:
                    handle.cancel()

    def _drive_with_progress(self, handles: Sequence[RequestHandle]) -> None:
        from kvpage.engine.progress import Progress  # rich is loaded only where a bar is shown

        waiting = [handle for handle in handles if not handle.done]
        with Progress(len(handles)) as bar:
            while waiting:
                self._advance(waiting[0])
                waiting = [handle for handle in waiting if not handle.done]
                tokens = sum(len(choice.token_ids) for handle in handles for choice in handle.output.outputs)
                bar.update(len(handles) - len(waiting), tokens)


def _as_prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, (str, Mapping)):
        return [prompts]
    if not isinstance(prompts, Sequence):
        raise RequestError(
            f"prompts must be text, token ids or a list of them, got {type(prompts).__name__}", param="prompt"
        )
    if prompts and all(isinstance(item, int) for item in prompts):
        return [prompts]  # type: ignore[list-item]  # one prompt of token ids
    return list(prompts)  # type: ignore[arg-type]


def _one_each(name: str, value: Any, count: int) -> list[Any]:
    if value is None or not isinstance(value, Sequence):
        return [value] * count
    if len(value) != count:
        raise RequestError(
            f"{name} has {len(value)} entries for {count} prompts: give one for all, or one each", param=name
        )
    return list(value)
