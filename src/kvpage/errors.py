"""What kvpage raises. Every message names the value, the limit and the way out."""

from __future__ import annotations


class KvpageError(Exception):
    """Base of every error that kvpage raises on purpose."""


class ConfigError(KvpageError, ValueError):
    """An engine option is wrong, or two contradict each other. Nothing was started."""


class CheckpointError(KvpageError):
    """A model folder or file is missing, damaged, or of a kind that kvpage cannot run."""


class PluginError(KvpageError):
    """A plugin, or a record it returned, breaks the contract of ``kvpage.api``."""


class RequestError(KvpageError, ValueError):
    """One request cannot be served. Other requests and the engine go on.

    Args:
        message: names the value, the limit and the way out.
        param: the request field at fault (``"max_tokens"``, ``"prompt"`` ...), for servers that report it.
    """

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class TooLongError(RequestError):
    """The prompt, or prompt and ``max_tokens``, exceed the context or could never fit in the whole KV pool."""


class QueueFullError(RequestError):
    """The waiting queue is at its limit (``max_num_queued_reqs`` or ``max_num_queued_tokens``); try again later."""


class EngineDeadError(KvpageError, RuntimeError):
    """The engine is closed, or a step failed as a whole; the cause is chained. Make a new engine."""
