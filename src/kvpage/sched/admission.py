"""What may enter the queue: limits on prompts, on the pool and on the queue itself."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from kvpage.api.scheduling import SchedulingPolicy
from kvpage.cache.manager import BlockManager
from kvpage.errors import ConfigError, KvpageError, QueueFullError, RequestError, TooLongError
from kvpage.params import Params, PoolingParams
from kvpage.sched.policy import FirstComeFirstServed
from kvpage.sched.sequence import Request

MAX_TOKEN_ID = 2**31 - 1


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """Limits of a scheduler.

    Attributes:
        max_num_seqs: sequences that run at once (slots of the runner).
        max_num_batched_tokens: tokens a step. Never more sequences run than this, so that each that decodes
            gets its token in every step.
        max_model_len: tokens of a sequence, prompt and output.
        policy: the order of requests.
        max_num_queued_reqs: requests that may wait beyond those that the free slots can take at once.
        max_num_queued_tokens: prompt tokens that may wait; a single prompt may wait whatever its length.
        long_prefill_token_threshold: most prompt tokens of one sequence a step; 0 = no such limit.
        policy_name: what messages call the policy.
        rope_switch: known tokens beyond which a sequence is turned by the long rope, from its first position on;
            ``None`` = the model has one rope. What was computed with the short one is then computed again.

    Raises:
        ConfigError: a limit is out of range.
    """

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    policy: SchedulingPolicy = field(default_factory=FirstComeFirstServed)
    max_num_queued_reqs: int | None = None
    max_num_queued_tokens: int | None = None
    long_prefill_token_threshold: int = 0
    policy_name: str = "fcfs"
    rope_switch: int | None = None

    def __post_init__(self) -> None:
        for name, least in (
            ("max_num_seqs", 1),
            ("max_num_batched_tokens", 1),
            ("max_model_len", 2),
            ("long_prefill_token_threshold", 0),
        ):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} must be at least {least}, got {getattr(self, name)}")
        for name in ("max_num_queued_reqs", "max_num_queued_tokens"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ConfigError(f"{name} must be at least 0, got {value}: leave it out for no limit")

    @property
    def num_slots(self) -> int:
        """Sequences that can run at once; slots are 0 .. num_slots - 1."""
        return min(self.max_num_seqs, self.max_num_batched_tokens)


def longest_length(request: Request, config: SchedulerConfig, blocks: BlockManager) -> int:
    """Known tokens at which each choice of ``request`` ends with "length"; its prompt, where it wants no token.

    Raises:
        RequestError: the prompt is empty or malformed.
        TooLongError: it is too long, or a choice could not fit in the whole pool even if it ran alone.
    """
    uncomputed = _uncomputed(request.params)
    _check_prompt(request, config, uncomputed)
    prompt = len(request.prompt_token_ids)
    max_tokens = request.params.max_tokens
    length = config.max_model_len
    if max_tokens is not None:
        length = min(length, prompt + max_tokens)
    capacity = blocks.capacity
    computed = length - uncomputed
    if capacity is None or computed <= capacity:
        return length
    if max_tokens is None and prompt <= capacity:
        return capacity + 1
    raise _never_fits(prompt, length, computed, capacity, blocks.block_size)


def _uncomputed(params: Params) -> int:
    """Tokens at the end of a sequence that need no KV: the last one drawn, or none where none is drawn."""
    return 0 if isinstance(params, PoolingParams) else 1


def _check_prompt(request: Request, config: SchedulerConfig, uncomputed: int) -> None:
    tokens = request.prompt_token_ids
    if not len(tokens):
        raise RequestError("the prompt is empty (0 tokens): give at least 1 token", param="prompt")
    longest = config.max_model_len - uncomputed
    if len(tokens) > longest:
        room = ", and at least 1 output token needs room" if uncomputed else ""
        raise TooLongError(
            f"This model's maximum context length is {config.max_model_len} tokens. However, your prompt contains "
            f"{len(tokens)} input tokens{room}. Shorten the prompt to at most {longest} tokens.",
            param="prompt",
        )
    low, high = min(tokens), max(tokens)
    if low < 0 or high > MAX_TOKEN_ID:
        raise RequestError(
            f"token id {low if low < 0 else high} is out of vocabulary: ids start at 0 and are at "
            f"most {MAX_TOKEN_ID}",
            param="prompt",
        )


def _never_fits(prompt: int, length: int, computed: int, capacity: int, block_size: int) -> TooLongError:
    needed, usable = -(-computed // block_size), capacity // block_size
    room = capacity + length - computed - prompt
    way_out = (
        f"Lower max_tokens to at most {room}"
        if room > 0
        else f"Shorten the prompt to at most {capacity} tokens"
    )
    new = f" and up to {length - prompt} new ones" if length > prompt else ""
    return TooLongError(
        f"This request can never fit in the KV cache: {prompt} prompt tokens{new} "
        f"need {needed} blocks of {block_size} tokens ({computed} tokens of KV), and the whole pool has {usable} "
        f"blocks ({capacity} tokens). {way_out}, or raise num_kv_blocks or kv_cache_memory.",
        param="max_tokens" if room > 0 else "prompt",
    )


class PolicyKeys:
    """Asks the policy for each request's key, and sees to it that all keys can be compared with each other."""

    __slots__ = ("_kind", "_name", "_policy")

    def __init__(self, config: SchedulerConfig) -> None:
        self._policy, self._name = config.policy, config.policy_name
        self._kind: type[object] | None = None

    def ask(self, request: Request, others: Collection[Request]) -> Any:
        """The key of ``request``, to lie among those of ``others``.

        Raises:
            RequestError: the policy fails, or gives a key that does not compare with those.
        """
        try:
            key = self._policy.key(request)
        except KvpageError:
            raise
        except Exception as error:  # foreign code
            raise RequestError(
                f"scheduling policy {self._name!r} failed on this request ({type(error).__name__}: {error}): take "
                "another, or repair its plugin"
            ) from error
        kind = type(key)
        if not others:
            self._kind = kind
        if kind is int and self._kind is int:
            return key
        known = [request.sequences[0].order[0] for request in others] or [key]
        # Keys of one plain type compare with each other; of any other type, each pair might not.
        for other in known[:1] if kind is self._kind and kind in (float, str, bool) else known:
            self._check(key, other)
        if kind is not self._kind:
            self._kind = None
        return key

    def _check(self, key: Any, other: Any) -> None:
        try:
            ordered = bool(key == key) and (bool(key < other) + bool(other < key) + bool(key == other)) == 1
        except Exception:  # foreign code
            ordered = False
        if not ordered:
            against = "" if other is key else f" with {other!r:.80}, the key of another"
            raise RequestError(
                f"scheduling policy {self._name!r} gave this request the key {key!r:.80}, which cannot be ordered"
                f"{against}: take another policy, or repair its plugin"
            )


class QueueLimits:
    """Counts the requests that wait for their first step, and refuses more than the limits allow."""

    __slots__ = ("_max_requests", "_max_tokens", "requests", "tokens")

    def __init__(self, config: SchedulerConfig) -> None:
        self._max_requests = config.max_num_queued_reqs
        self._max_tokens = config.max_num_queued_tokens
        self.requests = 0
        self.tokens = 0

    def enter(self, request: Request, free_slots: int) -> None:
        """Count ``request`` in.

        Raises:
            QueueFullError: a limit is reached.
        """
        if self._max_requests is not None and self.requests - free_slots >= self._max_requests:
            raise QueueFullError(
                f"{self.requests} requests are waiting, {free_slots} of them for a free slot, and "
                f"max_num_queued_reqs is {self._max_requests}: try again later or raise it"
            )
        tokens = len(request.prompt_token_ids)
        if self._max_tokens is not None and self.requests and self.tokens + tokens > self._max_tokens:
            raise QueueFullError(
                f"{self.tokens} prompt tokens are waiting, this prompt has {tokens}, and "
                f"max_num_queued_tokens is {self._max_tokens}: try again later or raise it"
            )
        self.requests += 1
        self.tokens += tokens

    def leave(self, request: Request) -> None:
        """``request`` was scheduled for the first time, or ended before."""
        self.requests -= 1
        self.tokens -= len(request.prompt_token_ids)

    def check(self, requests: Sequence[Request]) -> None:
        """Verify the counts against all unfinished requests (AssertionError)."""
        queued = [request for request in requests if request.first_scheduled is None]
        assert self.requests == len(queued), "queued requests are miscounted"
        assert self.tokens == sum(len(r.prompt_token_ids) for r in queued), "queued tokens are miscounted"
