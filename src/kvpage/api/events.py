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
    """Override what you want to hear; what you do not override costs nothing. Called on the thread that steps the
    engine: be quick.

    One request is told of in this order: ``admitted``; for each of its choices any number of times ``scheduled``,
    ``token`` ..., ``preempted``; then ``finished`` once a choice, whatever state it is in and however it ends; after
    the last of them ``completed``, once. A choice that waits has no tokens. Within a step come ``preempted``, then
    ``scheduled`` of all choices, then tokens and ends, then ``step``.

    A listener may call ``abort`` of the engine it hears; what that ends is told when the step is through. It must not
    step or close the engine. An exception is logged once and the listener is not called again; the engine goes on.
    """

    def admitted(self, request_id: str, prompt_tokens: int) -> None:
        """The engine accepted a request."""

    def scheduled(self, request_id: str, index: int, cached_tokens: int) -> None:
        """A choice takes its place among those that run: for the first time, or again after a preemption.

        ``cached_tokens``: how many of its tokens are not computed for it, since the prefix cache has them or since
        it splits off from choice 0 (n > 1), with which it shares the prompt.
        """

    def preempted(self, request_id: str, index: int) -> None:
        """A running choice lost its blocks to one before it, or to a step that was interrupted; it waits."""

    def token(self, request_id: str, index: int, token_ids: tuple[int, ...]) -> None:
        """A choice gained tokens, stop tokens included; all calls together give ``CompletionOutput.token_ids``."""

    def finished(self, request_id: str, index: int, reason: FinishReason, output_tokens: int) -> None:
        """One choice of a request ended."""

    def completed(self, request_id: str, metrics: RequestMetrics) -> None:
        """The last choice of a request ended."""

    def step(self, stats: StepStats) -> None:
        """A step was committed."""
