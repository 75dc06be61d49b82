"""The contract of an event listener: what it is told while an engine runs."""

from __future__ import annotations

from dataclasses import dataclass

from kvpage.outputs import FinishReason, RequestMetrics


@dataclass(frozen=True, slots=True)
class StepStats:
    """One step: counts of rows and tokens, sequences after it, and its wall time in seconds."""

    step: int
    num_rows: int
    num_tokens: int
    running: int
    waiting: int
    free_blocks: int
    used_blocks: int
    seconds: float


class EventListener:
    """Override what you want to hear. Called on the thread that steps the engine: be quick.

    An exception is logged once and the listener is not called again; the engine goes on.
    """

    def admitted(self, request_id: str, prompt_tokens: int) -> None:
        """The engine accepted a request."""

    def finished(self, request_id: str, index: int, reason: FinishReason, output_tokens: int) -> None:
        """One choice of a request ended."""

    def completed(self, request_id: str, metrics: RequestMetrics) -> None:
        """The last choice of a request ended."""

    def step(self, stats: StepStats) -> None:
        """A step was committed."""
