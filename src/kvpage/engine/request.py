"""A request as the engine follows it: choices that gain tokens and text and the events cut from them, or a vector."""

from __future__ import annotations

from abc import ABC, abstractmethod
from array import array
from dataclasses import replace
from typing import Any, Generic, TypeAlias, TypeVar

from kvpage.errors import RequestError
from kvpage.outputs import (
    CompletionOutput,
    EmbeddingOutput,
    FinishReason,
    PositionLogprobs,
    RequestMetrics,
    RequestOutput,
    TokenEvent,
)
from kvpage.params import PoolingParams, SamplingParams
from kvpage.sched.sequence import Request
from kvpage.text.detokenizer import Detokenizer
from kvpage.text.stops import StopStrings
from kvpage.text.tokenizer import Tokenizer

OutputT = TypeVar("OutputT", bound=RequestOutput | EmbeddingOutput)


class Choice:
    """One choice: its output so far, and how much of it was delivered as events.

    The engine's thread writes, any thread may read. Logprobs are written before their token and ``finish_reason``
    last, so a reader that sees a token sees its logprobs, and one that sees the end sees everything.
    """

    __slots__ = (
        "_detokenizer",
        "_min_tokens",
        "_sent_text",
        "_sent_tokens",
        "_shows_stop",
        "_stops",
        "_told",
        "last_token",
        "output",
    )

    def __init__(
        self, index: int, request: Request, params: SamplingParams, tokenizer: Tokenizer | None
    ) -> None:
        self.last_token = 0.0  # when it came, on the scheduler's clock
        self.output = CompletionOutput(index, logprobs=None if params.logprobs is None else [])
        if params.logprobs is not None:
            self.output.cumulative_logprob = 0.0
        self._detokenizer: Detokenizer | None = None
        self._stops: StopStrings | None = None
        self._min_tokens = params.min_tokens
        self._shows_stop = params.include_stop_str_in_output
        if tokenizer is not None and params.detokenize:
            self._detokenizer = Detokenizer(
                tokenizer,
                request.prompt_token_ids,
                skip_special_tokens=params.skip_special_tokens,
                spaces_between_special_tokens=params.spaces_between_special_tokens,
            )
            if params.stop:
                self._stops = StopStrings(
                    params.stop_strings, include_in_output=params.include_stop_str_in_output
                )
        self._sent_tokens = 0
        self._sent_text = 0
        self._told = False

    def add(self, token_id: int, logprobs: PositionLogprobs | None, *, silent: bool) -> str | None:
        """A sampled token; returns the stop string it completed, if any.

        ``silent``: a stop token: its own text is not part of the answer, unless stop strings are to be shown.
        """
        output = self.output
        if logprobs is not None and output.logprobs is not None:
            output.logprobs.append(logprobs)
            output.cumulative_logprob = (output.cumulative_logprob or 0.0) + logprobs[token_id].logprob
        output.token_ids.append(token_id)
        if self._detokenizer is None or (silent and not self._shows_stop):
            return None
        delta = self._detokenizer.push((token_id,))
        matched = None
        if self._stops is not None and delta:
            if silent or len(output.token_ids) < self._min_tokens:
                delta = self._stops.ignore(delta)
            else:
                delta, matched = self._stops.push(delta)
        if delta:
            output.text += delta
        return matched

    def finish(self, reason: FinishReason, stop_reason: int | str | None, *, flush: bool = True) -> None:
        """The terminal state. ``flush``: text that is held back is shown; not after a stop string or a fault."""
        output = self.output
        if self._detokenizer is not None and flush:
            rest = self._detokenizer.flush()
            if self._stops is not None:
                rest = self._stops.push(rest)[0] + self._stops.flush()
            output.text += rest
        output.stop_reason = stop_reason
        output.finish_reason = reason

    def take_event(self) -> TokenEvent | None:
        """What this choice gained since the last call; ``None`` if nothing."""
        output = self.output
        reason = output.finish_reason  # read first: it was written last
        tokens, text = len(output.token_ids), output.text
        if tokens == self._sent_tokens and len(text) == self._sent_text and (reason is None or self._told):
            return None
        logprobs = None if output.logprobs is None else output.logprobs[self._sent_tokens : tokens]
        event = TokenEvent(
            index=output.index,
            token_ids=output.token_ids[self._sent_tokens : tokens],
            delta=text[self._sent_text :],
            logprobs=logprobs,
            finish_reason=reason,
            stop_reason=output.stop_reason if reason is not None else None,
        )
        self._sent_tokens, self._sent_text, self._told = tokens, len(text), reason is not None
        return event


class RequestState(ABC, Generic[OutputT]):
    """One accepted request: what the scheduler knows of it, its output so far, and how it ended.

    Attributes:
        error: what ended it, if an error did.
        first_token, last_token: when its first and last token (or its vector) came, on the scheduler's clock.
    """

    __slots__ = ("error", "first_token", "last_token", "output", "request")

    def __init__(self, request: Request, output: OutputT) -> None:
        self.request = request
        self.output = output
        self.error: Exception | None = None
        self.first_token: float | None = None
        self.last_token: float | None = None

    @property
    def done(self) -> bool:
        """Whether every choice has ended; written after all else."""
        return self.output.finished

    @abstractmethod
    def ending(self, index: int) -> tuple[FinishReason | None, int]:
        """Finish reason and number of tokens of one choice."""

    @abstractmethod
    def finish(
        self, index: int, reason: FinishReason, stop_reason: int | str | None, *, flush: bool = True
    ) -> None:
        """One choice ended; with the last one, the request did. ``flush``: text that is held back is shown."""

    @abstractmethod
    def fail(self, error: Exception) -> list[int]:
        """The request ended in error, which its readers get raised. Returns the choices that were unfinished, now
        "error"."""

    def _close(self) -> None:
        request, metrics = self.request, self.output.metrics
        metrics.cached_tokens = request.cached_tokens
        metrics.preemptions = request.preemptions
        if request.first_scheduled is not None:
            metrics.queued = request.first_scheduled - request.arrival
            if self.first_token is not None:
                metrics.prefill = self.first_token - request.first_scheduled
                if self.last_token is not None:
                    metrics.decode = self.last_token - self.first_token
        self.output.finished = True


AnyState: TypeAlias = RequestState[Any]


class GenerationState(RequestState[RequestOutput]):
    """A request that gains tokens, in one choice or more."""

    __slots__ = ("_unfinished", "choices")

    def __init__(
        self,
        request: Request,
        params: SamplingParams,
        prompt: str | None,
        tokenizer: Tokenizer | None,
        arrival_time: float,
    ) -> None:
        self.choices = [Choice(index, request, params, tokenizer) for index in range(params.n)]
        output = RequestOutput(
            request_id=request.request_id,
            prompt=prompt,
            prompt_token_ids=request.prompt_token_ids,
            outputs=[choice.output for choice in self.choices],
            metrics=RequestMetrics(arrival_time=arrival_time),
        )
        super().__init__(request, output)
        self._unfinished = params.n

    def ending(self, index: int) -> tuple[FinishReason | None, int]:
        output = self.choices[index].output
        return output.finish_reason, len(output.token_ids)

    def finish(
        self, index: int, reason: FinishReason, stop_reason: int | str | None, *, flush: bool = True
    ) -> None:
        choice = self.choices[index]
        if choice.output.finish_reason is not None:
            return
        choice.finish(reason, stop_reason, flush=flush)
        self._unfinished -= 1
        if not self._unfinished:
            self._close()

    def fail(self, error: Exception) -> list[int]:
        if self.done:
            return []
        unfinished = [choice for choice in self.choices if choice.output.finish_reason is None]
        for choice in unfinished:
            choice.finish("error", None, flush=False)
        self.error = error
        self._close()
        return [choice.output.index for choice in unfinished]

    def take_events(self) -> list[TokenEvent]:
        """One event for each choice that gained something since the last call."""
        return [event for choice in self.choices if (event := choice.take_event()) is not None]


class EmbeddingState(RequestState[EmbeddingOutput]):
    """A request that gets the vector of its prompt, all at once."""

    __slots__ = ("_timeout",)

    def __init__(
        self, request: Request, params: PoolingParams, prompt: str | None, arrival_time: float
    ) -> None:
        output = EmbeddingOutput(
            request_id=request.request_id,
            prompt=prompt,
            prompt_token_ids=request.prompt_token_ids,
            metrics=RequestMetrics(arrival_time=arrival_time),
        )
        super().__init__(request, output)
        self._timeout = params.timeout

    def ending(self, index: int) -> tuple[FinishReason | None, int]:
        return self.output.finish_reason, 0

    def give(self, embedding: array[float], now: float) -> None:
        """The vector, at ``now`` on the scheduler's clock; ``finish`` follows."""
        self.output.embedding = embedding
        self.first_token = now

    def finish(
        self, index: int, reason: FinishReason, stop_reason: int | str | None, *, flush: bool = True
    ) -> None:
        if stop_reason == "timeout":
            self.fail(
                RequestError(
                    f"the embedding was not there after {self._timeout} s: raise timeout or leave it out",
                    param="timeout",
                )
            )
        elif not self.done:
            self.output.finish_reason = reason
            self._close()

    def fail(self, error: Exception) -> list[int]:
        if self.done:
            return []
        self.output.finish_reason = "error"
        self.error = error
        self._close()
        return [0]


def with_texts(logprobs: PositionLogprobs, tokenizer: Tokenizer | None) -> PositionLogprobs:
    """The same mapping with each token's text filled in."""
    if tokenizer is None:
        return logprobs
    return {
        token: replace(value, decoded_token=tokenizer.token_text(token)) for token, value in logprobs.items()
    }
