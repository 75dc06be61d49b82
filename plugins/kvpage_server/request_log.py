"""One JSON line a request, with the ids by which a client, the server and the engine know it."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from typing import Any, TextIO

LOG = logging.getLogger("kvpage.server.requests")
HANDLES_KEY = "kvpage.handles"
"""In the ASGI scope: the engine's requests behind an HTTP request."""


def remember(scope: MutableMapping[str, Any], handles: Sequence[Any]) -> None:
    """Tell the log which requests in the engine an HTTP request became."""
    scope[HANDLES_KEY] = handles


def write_line(
    scope: MutableMapping[str, Any],
    request_id: str,
    status: int | None,
    seconds: float,
    max_prompt: int | None,
) -> None:
    """Log a request that has ended.

    Args:
        status: ``None``: the client went before there was one.
        max_prompt: characters of the prompts to show; ``None`` = none at all.
    """
    client = scope.get("client")
    entry: dict[str, Any] = {
        "time": datetime.now(timezone.utc).isoformat(timespec="milliseconds"),
        "request_id": request_id,
        "client": client[0] if client else None,
        "method": scope["method"],
        "path": scope["path"],
        "status": status,
        "seconds": round(seconds, 6),
    }
    handles = scope.get(HANDLES_KEY)
    if handles:
        entry["engine_requests"] = [_engine_request(handle.output, max_prompt) for handle in handles]
    LOG.info("%s", json.dumps(entry))


@contextmanager
def lines_go_to(stream: TextIO) -> Iterator[None]:
    """Within the block the lines are written to ``stream`` and nowhere else; for programs that own the process."""
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logging.Formatter("%(message)s"))
    level, propagate = LOG.level, LOG.propagate
    LOG.addHandler(handler)
    LOG.setLevel(logging.INFO)
    LOG.propagate = False
    try:
        yield
    finally:
        LOG.removeHandler(handler)
        LOG.setLevel(level)
        LOG.propagate = propagate


def _engine_request(output: Any, max_prompt: int | None) -> dict[str, Any]:
    choices = getattr(output, "outputs", None)
    metrics = output.metrics
    entry = {
        "id": output.request_id,
        "prompt_tokens": len(output.prompt_token_ids),
        "cached_tokens": metrics.cached_tokens,
        "queued": metrics.queued,
        "prefill": metrics.prefill,
        "decode": metrics.decode,
        "preemptions": metrics.preemptions,
    }
    if choices is None:
        entry["finish_reasons"] = [output.finish_reason]
    else:
        entry["completion_tokens"] = sum(len(choice.token_ids) for choice in choices)
        entry["finish_reasons"] = [choice.finish_reason for choice in choices]
    if max_prompt is not None:
        entry["prompt"] = None if output.prompt is None else output.prompt[:max_prompt]
    return entry
