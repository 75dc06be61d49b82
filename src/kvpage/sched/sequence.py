"""Request and Sequence: what is asked for, and each of its choices on the way to its end."""

from __future__ import annotations

from collections import abc
from dataclasses import dataclass, field
from typing import Any

from kvpage.cache.manager import BlockManager
from kvpage.cache.tables import BlockTables
from kvpage.outputs import FinishReason, PositionLogprobs
from kvpage.params import Params, Pooling, PoolingParams

LONG_ROPE = ", long rope"
"""The variant of a long sequence's cached prefixes."""


@dataclass(slots=True, eq=False)
class Request:
    """One prompt and what is wanted of it, ``params``: tokens, in ``params.n`` sequences, or a vector, in one.

    Attributes:
        request_id: unique among the live requests.
        params: with every default filled in.
        seed: key of the sampling noise (0 where nothing is drawn).
        arrival: time of submission on the scheduler's clock, seconds; ``params.timeout`` counts from it.
        priority: lower goes first (policy "priority").
        cache_salt, adapter: prefixes are shared only among requests where both are equal.
        bad_word_ids: ``params.bad_words``, tokenised.
        stop_token_ids: every token id that ends a choice: EOS, unless it is ignored, and those asked for.
        eos_token_ids: those of them whose ``stop_reason`` is ``None``, because they are the model's own end.
        sequences: the choices, by index. From here on: set by the scheduler.
        number: counts submissions.
        first_scheduled: time at which a first token was scheduled, seconds.
        cached_tokens: prompt tokens that the prefix cache served at the first admission.
        preemptions: times one of the sequences lost its blocks.
        unfinished: sequences without a finish reason.
    """

    request_id: str
    prompt_token_ids: abc.Sequence[int]
    params: Params
    seed: int
    arrival: float
    priority: int = 0
    cache_salt: str | None = None
    adapter: str | None = None
    bad_word_ids: abc.Sequence[abc.Sequence[int]] = ()
    stop_token_ids: frozenset[int] = frozenset()
    eos_token_ids: frozenset[int] = frozenset()
    sequences: list[Sequence] = field(default_factory=list, init=False, repr=False)
    number: int = field(default=-1, init=False)
    first_scheduled: float | None = field(default=None, init=False)
    cached_tokens: int = field(default=0, init=False)
    preemptions: int = field(default=0, init=False)
    unfinished: int = field(default=0, init=False)

    @property
    def finished(self) -> bool:
        """Whether it was submitted and every choice has ended."""
        return bool(self.sequences) and self.unfinished == 0


@dataclass(slots=True, eq=False)
class Sequence:
    """One choice. It is *unborn* (waits for choice 0 to compute the prompt), *waiting*, *running* (has a slot)
    or *finished*; after a preemption it is waiting again.

    Attributes:
        index: 0 .. n - 1; also the stream of the sampling noise.
        token_ids: the known tokens: the prompt and everything sampled. Not to be changed by others.
        max_length: known tokens at which it ends with "length".
        order: place in the policy's order; no two sequences have the same.
        blocks: block tables, one a KV group.
        slot: its place in the runner, -1 when it has none.
        computed: known tokens whose KV is in the blocks.
        in_flight: tokens of a step that was scheduled and not yet committed.
        writable: while ``computed`` is less, a next token can be computed without asking the block manager;
            0 = always ask.
        queued: whether it is waiting.
        children: choices that are to be forked off once the prompt is computed (choice 0 only).
        reserved: slots kept for them.
        prompt_logprobs: what is known of them while they are still to be delivered, else ``None``.
        pooling: how its prompt becomes a vector, with which it ends; ``None`` = it draws tokens.
        finish_reason, stop_reason: as in ``CompletionOutput``.
        error: why it ended with finish reason "error", where the step said so.
        long_rope: whether its KV is computed with the long rope; see ``outgrew``.
    """

    request: Request
    index: int
    token_ids: list[int] = field(repr=False)
    prompt_length: int
    max_length: int
    stop_token_ids: frozenset[int]
    order: tuple[Any, int, int]
    blocks: BlockTables = field(repr=False)
    slot: int = -1
    computed: int = 0
    in_flight: int = 0
    writable: int = 0
    queued: bool = False
    children: list[Sequence] = field(default_factory=list, repr=False)
    reserved: list[int] = field(default_factory=list)
    prompt_logprobs: list[PositionLogprobs | None] | None = field(default=None, repr=False)
    pooling: Pooling | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    error: str | None = None
    long_rope: bool = False

    def outgrew(self, switch: int) -> bool:
        """Whether it is longer than ``switch`` tokens, and its KV is still that of the short rope."""
        return not self.long_rope and len(self.token_ids) > switch

    def lengthen(self, blocks: BlockManager) -> None:
        """From here on it is computed with the long rope; it holds no blocks now.

        Its cached prefixes are others than those of the same tokens in short sequences.
        """
        self.long_rope = True
        self.blocks = blocks.open(self.request.cache_salt, self.request.adapter, LONG_ROPE)

    @property
    def needs_every_position(self) -> bool:
        """Whether what is wanted of it comes from every position, none of which may be a prefix hit then."""
        return self.prompt_logprobs is not None or self.pooling == "mean"

    @property
    def num_output(self) -> int:
        """Tokens generated so far."""
        return len(self.token_ids) - self.prompt_length

    @property
    def output_token_ids(self) -> list[int]:
        """Tokens generated so far (a copy)."""
        return self.token_ids[self.prompt_length :]

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None


def open_sequences(
    request: Request, max_length: int, key: Any, number: int, blocks: BlockManager, rope_switch: int | None
) -> None:
    """Make the sequences of ``request``, which the policy orders by ``key`` and that is submission ``number``.

    Those longer than ``rope_switch`` take the long rope at once.
    """
    params, prompt = request.params, list(request.prompt_token_ids)
    request.number = number
    request.sequences = [
        Sequence(
            request,
            index,
            prompt[:],
            len(prompt),
            max_length,
            request.stop_token_ids,
            (key, number, index),
            blocks.open(request.cache_salt, request.adapter),
            pooling=params.pooling if isinstance(params, PoolingParams) else None,
        )
        for index in range(params.n)
    ]
    if rope_switch is not None and len(prompt) > rope_switch:
        for sequence in request.sequences:
            sequence.lengthen(blocks)
    request.unfinished = len(request.sequences)
    first = request.sequences[0]
    first.children = request.sequences[1:]
    first.prompt_logprobs = None if params.prompt_logprobs is None else [None]
