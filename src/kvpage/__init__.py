"""kvpage: an LLM serving engine that lives inside your program.

Importing it loads nothing heavy; each public name is imported when it is first used (PEP 562).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from kvpage.engine.aio import AsyncEngine
    from kvpage.engine.engine import Engine
    from kvpage.engine.llm import LLM, AsyncEngineArgs, AsyncLLMEngine, EngineArgs
    from kvpage.errors import (
        CheckpointError,
        ConfigError,
        EngineDeadError,
        KvpageError,
        PluginError,
        QueueFullError,
        RequestError,
        TooLongError,
    )
    from kvpage.hookspecs import hookimpl
    from kvpage.outputs import CompletionOutput, EmbeddingOutput, Logprob, RequestOutput, TokenEvent
    from kvpage.params import SamplingParams
    from kvpage.plugins import PluginRegistry

_NAMES = {
    "AsyncEngine": "kvpage.engine.aio",
    "Engine": "kvpage.engine.engine",
    "LLM": "kvpage.engine.llm",
    "AsyncEngineArgs": "kvpage.engine.llm",
    "AsyncLLMEngine": "kvpage.engine.llm",
    "EngineArgs": "kvpage.engine.llm",
    "CheckpointError": "kvpage.errors",
    "ConfigError": "kvpage.errors",
    "EngineDeadError": "kvpage.errors",
    "KvpageError": "kvpage.errors",
    "PluginError": "kvpage.errors",
    "QueueFullError": "kvpage.errors",
    "RequestError": "kvpage.errors",
    "TooLongError": "kvpage.errors",
    "hookimpl": "kvpage.hookspecs",
    "CompletionOutput": "kvpage.outputs",
    "EmbeddingOutput": "kvpage.outputs",
    "Logprob": "kvpage.outputs",
    "RequestOutput": "kvpage.outputs",
    "TokenEvent": "kvpage.outputs",
    "SamplingParams": "kvpage.params",
    "PluginRegistry": "kvpage.plugins",
}

__all__ = [
    "LLM",
    "AsyncEngine",
    "AsyncEngineArgs",
    "AsyncLLMEngine",
    "CheckpointError",
    "CompletionOutput",
    "ConfigError",
    "EmbeddingOutput",
    "Engine",
    "EngineArgs",
    "EngineDeadError",
    "KvpageError",
    "Logprob",
    "PluginError",
    "PluginRegistry",
    "QueueFullError",
    "RequestError",
    "RequestOutput",
    "SamplingParams",
    "TokenEvent",
    "TooLongError",
    "__version__",
    "hookimpl",
]


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        value = getattr(importlib.import_module(_NAMES[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'kvpage' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
