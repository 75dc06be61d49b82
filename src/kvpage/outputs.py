"""What an engine gives back: whole outputs, and the events of a stream."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

FinishReason: TypeAlias = Literal["stop", "length", "abort", "error"]
"""stop: EOS, a stop token or a stop string. length: max_tokens, context, or timeout. abort: cancelled."""


@dataclass(frozen=True, slots=True)
class Logprob:
    """One candidate token at one position: natural-log probability, rank (1 = likeliest), decoded text."""

    logprob: float
    rank: int
    decoded_token: str | None = None


PositionLogprobs: TypeAlias = Mapping[int, Logprob]
"""Token id -> Logprob; always holds the chosen token, and the asked-for top tokens."""


@dataclass(slots=True)
class CompletionOutput:
    """One choice of a request.

    Attributes:
        index: 0 .. n-1.
        text: decoded so far; never ends in half a code point.
        token_ids: tokens generated so far, the stop token included.
        cumulative_logprob: sum over ``token_ids`` where logprobs were asked for.
        logprobs: one mapping a token, where asked for.
        finish_reason: ``None`` while running.
        stop_reason: the matched stop string or token id, "timeout", or ``None`` (EOS, max_tokens).
    """

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    cumulative_logprob: float | None = None
    logprobs: list[PositionLogprobs] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass(slots=True)
class RequestMetrics:
    """What one request cost. Times in seconds.

    Attributes:
        arrival_time: ``time.time()`` at submission.
        queued: submission -> first scheduled. prefill: first scheduled -> first token (or the embedding).
        decode: first token -> last token.
        cached_tokens: prompt tokens whose KV came from the prefix cache at first admission.
        preemptions: times a sequence of the request lost its blocks and was recomputed.
    """

    arrival_time: float = 0.0
    queued: float | None = None
    prefill: float | None = None
    decode: float | None = None
    cached_tokens: int = 0
    preemptions: int = 0

    @property
    def time_to_first_token(self) -> float | None:
        """Seconds from submission to the first token."""
        return None if self.queued is None or self.prefill is None else self.queued + self.prefill


@dataclass(slots=True)
class RequestOutput:
    """A request's whole output so far: the prompt as given, its token ids, and one choice per n."""

    request_id: str
    prompt: str | None
    prompt_token_ids: Sequence[int]
    outputs: list[CompletionOutput]
    prompt_logprobs: list[PositionLogprobs | None] | None = None
    finished: bool = False
    metrics: RequestMetrics = field(default_factory=RequestMetrics)

    @property
    def num_cached_tokens(self) -> int:
        """Prompt tokens that the prefix cache served."""
        return self.metrics.cached_tokens


@dataclass(slots=True)
class EmbeddingOutput:
    """The vector of one prompt.

    Attributes:
        embedding: float32 [hidden size], ``array("f")``: ``list()`` it, give it to ``numpy.frombuffer``, or its
            bytes to ``base64.b64encode``. Empty while it is not there, which it never is after a cancel.
        finish_reason: "stop" = the embedding is there; "abort", "error"; ``None`` while running.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: Sequence[int]
    embedding: array[float] = field(default_factory=lambda: array("f"))
    finish_reason: FinishReason | None = None
    finished: bool = False
    metrics: RequestMetrics = field(default_factory=RequestMetrics)

    @property
    def num_cached_tokens(self) -> int:
        """Prompt tokens that the prefix cache served."""
        return self.metrics.cached_tokens


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """What one choice gained: new token ids and the text that became certain with them.

    ``delta`` may lag behind ``token_ids`` (half a code point, a possible stop string) and catches up at the
    end. The last event of a choice has a ``finish_reason``; there is exactly one such event a choice.
    """

    index: int
    token_ids: Sequence[int]
    delta: str
    logprobs: Sequence[PositionLogprobs] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
