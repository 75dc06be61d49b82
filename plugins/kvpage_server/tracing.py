"""OpenTelemetry spans of requests, as a plugin: ``KVPAGE_PLUGINS=+kvpage_server.tracing`` turns it on.

It needs opentelemetry-api alone and sends nothing by itself: spans go where the program's own tracer provider sends
them (``opentelemetry-instrument kvpage serve ...``, or a provider that an embedding program sets). Names of
attributes are those of vLLM's traces.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvpage import hookimpl
from kvpage.api.events import EventListener
from kvpage.api.records import EventListenerRecord
from kvpage.outputs import FinishReason, RequestMetrics

if TYPE_CHECKING:
    from opentelemetry.trace import Span, Tracer

KVPAGE_API_VERSION = "1.0"
SPAN = "llm_request"


@hookimpl
def kvpage_event_listeners() -> list[EventListenerRecord]:
    return [
        EventListenerRecord(
            name="opentelemetry",
            factory="kvpage_server.tracing:RequestSpans",
            needs=("opentelemetry",),
            install="pip install opentelemetry-sdk",
        )
    ]


@dataclass(slots=True)
class _Open:
    """A request that has not ended. ``began``: ``time.monotonic()``."""

    span: Span
    began: float
    tokens: int = 0
    preemptions: int = 0


class RequestSpans(EventListener):
    """One span a request, from its submission to its end.

    Args:
        tracer: ``None`` = that of the program's tracer provider.
    """

    def __init__(self, tracer: Tracer | None = None) -> None:
        if tracer is None:
            from opentelemetry.trace import get_tracer  # optional: who turns this plugin on has it

            tracer = get_tracer("kvpage")
        self._tracer = tracer
        self._open: dict[str, _Open] = {}

    def admitted(self, request_id: str, prompt_tokens: int) -> None:
        span = self._tracer.start_span(
            SPAN, attributes={"gen_ai.request.id": request_id, "gen_ai.usage.prompt_tokens": prompt_tokens}
        )
        self._open[request_id] = _Open(span, time.monotonic())

    def preempted(self, request_id: str, index: int) -> None:
        request = self._open[request_id]
        request.preemptions += 1
        request.span.add_event("preempted", {"index": index})

    def token(self, request_id: str, index: int, token_ids: tuple[int, ...]) -> None:
        request = self._open[request_id]
        if not request.tokens:
            request.span.add_event("first_token")
        request.tokens += len(token_ids)

    def finished(self, request_id: str, index: int, reason: FinishReason, output_tokens: int) -> None:
        self._open[request_id].span.add_event("finished", {"index": index, "reason": reason})

    def completed(self, request_id: str, metrics: RequestMetrics) -> None:
        request = self._open.pop(request_id)
        latencies = {
            "gen_ai.latency.time_in_queue": metrics.queued,
            "gen_ai.latency.time_to_first_token": metrics.time_to_first_token,
            "gen_ai.latency.time_in_model_prefill": metrics.prefill,
            "gen_ai.latency.time_in_model_decode": metrics.decode,
            "gen_ai.latency.e2e": time.monotonic() - request.began,
        }
        request.span.set_attributes(
            {
                "gen_ai.usage.completion_tokens": request.tokens,
                "kvpage.cached_tokens": metrics.cached_tokens,
                "kvpage.preemptions": request.preemptions,
                **{name: seconds for name, seconds in latencies.items() if seconds is not None},
            }
        )
        request.span.end()
