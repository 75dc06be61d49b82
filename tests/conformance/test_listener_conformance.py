"""Well-behaved event listeners pass the suite of event listeners."""

from __future__ import annotations

from kvpage.api.events import EventListener, StepStats
from kvpage.outputs import FinishReason, RequestMetrics
from kvpage.testing.event_listeners import EventListenerConformance


class Counters(EventListener):
    """What a metrics exporter would keep: open requests, tokens, ends by reason."""

    def __init__(self) -> None:
        self.open: dict[str, int] = {}
        self.ends: dict[str, int] = {}
        self.preemptions = self.tokens = self.steps = 0

    def admitted(self, request_id: str, prompt_tokens: int) -> None:
        self.open[request_id] = prompt_tokens

    def preempted(self, request_id: str, index: int) -> None:
        self.preemptions += 1

    def token(self, request_id: str, index: int, token_ids: tuple[int, ...]) -> None:
        self.tokens += len(token_ids)

    def finished(self, request_id: str, index: int, reason: FinishReason, output_tokens: int) -> None:
        self.ends[reason] = self.ends.get(reason, 0) + 1

    def completed(self, request_id: str, metrics: RequestMetrics) -> None:
        del self.open[request_id]

    def step(self, stats: StepStats) -> None:
        self.steps += 1


class TestCounters(EventListenerConformance):
    listener = Counters
