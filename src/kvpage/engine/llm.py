"""vLLM's names, for people who come from there: LLM, AsyncLLMEngine, EngineArgs, AsyncEngineArgs."""

from __future__ import annotations

import copy
from collections.abc import AsyncIterator, Sequence
from typing import Any

from kvpage.config import EngineOptions
from kvpage.engine.aio import AsyncEngine, AsyncHandle
from kvpage.engine.engine import Engine
from kvpage.engine.inputs import Prompt
from kvpage.engine.request import GenerationState
from kvpage.outputs import RequestOutput
from kvpage.params import SamplingParams
from kvpage.plugins import PluginRegistry


class LLM(Engine):
    """``Engine`` with vLLM's argument names: ``sampling_params``, ``use_tqdm``."""

    def generate(  # type: ignore[override]
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool | None = None,
        priority: Sequence[int] | None = None,
    ) -> list[RequestOutput]:
        return super().generate(prompts, sampling_params, priority=priority, progress=use_tqdm)

    def chat(  # type: ignore[override]
        self,
        messages: Sequence[Any],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool | None = None,
        **template_options: Any,
    ) -> list[RequestOutput]:
        return super().chat(messages, sampling_params, progress=use_tqdm, **template_options)


class EngineArgs:
    """Engine options by vLLM's names, checked when made; ``options`` holds them."""

    def __init__(self, model: Any = "demo", **options: Any) -> None:
        self.options = EngineOptions.from_keywords(model=model, **options)
        self.keywords: dict[str, Any] = {"model": model, **options}


class AsyncEngineArgs(EngineArgs):
    """The same, for ``AsyncLLMEngine.from_engine_args``."""


class CumulativeHandle(AsyncHandle):
    """Iterates as vLLM does: each item is the whole RequestOutput so far."""

    async def _events(self) -> AsyncIterator[Any]:
        ended = False
        async for _ in super()._events():
            snapshot = copy.deepcopy(self.output)
            ended = snapshot.finished
            yield snapshot
        if not ended:
            yield copy.deepcopy(self.output)


class AsyncLLMEngine(AsyncEngine):
    """``AsyncEngine`` with vLLM's names. ``generate`` gives a handle that can be awaited, and that yields
    cumulative RequestOutputs when iterated."""

    @classmethod
    def from_engine_args(cls, args: EngineArgs, *, plugins: PluginRegistry | None = None) -> AsyncLLMEngine:
        return cls(plugins=plugins, **args.keywords)

    def generate(  # type: ignore[override]
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        priority: int = 0,
    ) -> AsyncHandle:
        return super().generate(prompt, sampling_params, request_id=request_id, priority=priority)

    async def abort(self, request_id: str) -> None:  # type: ignore[override]
        super().abort(request_id)

    def shutdown(self) -> None:
        """vLLM's name for ``close``."""
        self.close()

    def _make_handle(self, state: GenerationState) -> AsyncHandle:
        return CumulativeHandle(self, self._worker, state)
