"""The sampler: one token a row of logits, by each slot's parameters and noise."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from kvpage.api.sampling import NO_TOKEN, LogitsProcessor, SamplingKernel, Shaping
from kvpage.outputs import PositionLogprobs
from kvpage.params import SamplingParams
from kvpage.sample.custom import CustomProcessors
from kvpage.sample.draw import select_rows
from kvpage.sample.logprobs import position_logprobs, prompt_position_logprobs, raw_logprobs
from kvpage.sample.noise import uniforms
from kvpage.sample.processors import SlotRules, apply_rules, slot_rules

Int64Array: TypeAlias = npt.NDArray[np.int64]

GREEDY_BELOW = 1e-5
"""A temperature below this is greedy: dividing by it would overflow (vLLM's limit)."""

# What a slot needs beyond the argmax of its logits. A batch whose flags are all 0 takes the short way.
_DRAWS = 1
_RULES = 2
_CUSTOM = 4
_LOGPROBS = 8
_CHANGES = _RULES | _CUSTOM


@dataclass(slots=True)
class Sampled:
    """What one call of ``Sampler.sample`` chose, in the order of the logits' rows.

    Attributes:
        token_ids: N tokens; 0 for a row in ``errors``.
        logprobs: one mapping for each row that asked (``None`` for others); ``None`` if no row did.
        errors: row index -> why this row has no token; its request ends in error, the others go on.
    """

    token_ids: list[int]
    logprobs: list[PositionLogprobs | None] | None = None
    errors: dict[int, str] = field(default_factory=dict)


class Sampler:
    """Chooses tokens for the slots of one engine.

    What a slot needs is kept in arrays indexed by slot; a token depends only on its row of logits, the slot's
    parameters and known tokens, and the noise of (seed, position, stream), never on the batch, the slot's number
    or the steps that led there. Steps of ``sample``, in this order:

    1. raw log-probabilities, before any change, where logprobs were asked for
    2. allowed_token_ids: all other tokens are forbidden
    3. min_tokens: EOS and stop_token_ids are forbidden until then
    4. bad_words: a token that would complete one is forbidden
    5. logit_bias is added
    6. repetition penalty (tokens of prompt and output), then frequency and presence penalties (output only)
    7. the request's logits processors, in their order of registration
    8. greedy rows (temperature 0): the largest logit, the lowest id on ties; done
    9. temperature
    10. top-k, top-p, min-p: thresholds, so ties with the last token kept are kept
    11. the token by inverse CDF in order of token id over the kept set, from the slot's noise
    12. the slot's state advances by the token

    Not thread-safe: calls come from the thread that steps the engine.

    Args:
        vocab_size: V, the width of the logits.
        num_slots: slots are 0 .. num_slots - 1.
        eos_token_ids: what min_tokens forbids beside stop_token_ids.
        processors: name -> what makes the logits processor; each is made once, when a request first names it.
        kernel: makes tokens of logits (steps 8 to 11).
        device: where logits live.
    """

    def __init__(
        self,
        *,
        vocab_size: int,
        num_slots: int,
        eos_token_ids: Sequence[int],
        processors: Mapping[str, Callable[[], LogitsProcessor]],
        kernel: SamplingKernel,
        device: torch.device | str = "cpu",
    ) -> None:
        self.vocab_size = vocab_size
        self.device = torch.device(device)
        self._eos_token_ids = tuple(eos_token_ids)
        self._kernel = kernel
        self._custom = CustomProcessors(processors)
        self._rules: dict[int, SlotRules] = {}
        # All [num_slots]. A position is the index that the slot's next token will have.
        self._flags = np.zeros(num_slots, dtype=np.int64)
        self._positions = np.zeros(num_slots, dtype=np.int64)
        self._min_positions = np.zeros(num_slots, dtype=np.int64)
        self._seeds = np.zeros(num_slots, dtype=np.uint64)
        self._streams = np.zeros(num_slots, dtype=np.int64)
        self._logprobs = np.zeros(num_slots, dtype=np.int64)
        self._temperature = np.zeros(num_slots, dtype=np.float32)  # 0 = greedy
        self._top_k = np.zeros(num_slots, dtype=np.int64)
        self._top_p = np.ones(num_slots, dtype=np.float64)
        self._min_p = np.zeros(num_slots, dtype=np.float32)
        self._arrays = (
            self._flags,
            self._positions,
            self._min_positions,
            self._seeds,
            self._streams,
            self._logprobs,
            self._temperature,
            self._top_k,
            self._top_p,
            self._min_p,
        )

    def admit(
        self,
        slot: int,
        params: SamplingParams,
        *,
        seed: int,
        stream: int,
        token_ids: Sequence[int],
        prompt_length: int,
        bad_word_ids: Sequence[Sequence[int]] = (),
    ) -> None:
        """A sequence starts, or after a preemption goes on, on ``slot``.

        Args:
            params: with defaults filled (``SamplingParams.with_defaults``).
            seed: 0 .. 2**64 - 1; the params' own, or fresh entropy.
            stream: index of the choice.
            token_ids: all known tokens, prompt and generated; the slot's state is rebuilt from them.
            prompt_length: how many of them are the prompt.
            bad_word_ids: ``params.bad_words`` as token sequences.

        Raises:
            RequestError: a token id outside the vocabulary, or an unknown logits processor.
            Exception: whatever a logits processor's ``admit`` raises. The slot is then free.
        """
        self.release(slot)
        prompt_ids, output_ids = token_ids[:prompt_length], token_ids[prompt_length:]
        rules = slot_rules(
            params,
            bad_word_ids=bad_word_ids,
            prompt_ids=prompt_ids,
            output_ids=output_ids,
            eos_token_ids=self._eos_token_ids,
            vocab_size=self.vocab_size,
        )
        if params.logits_processors:
            self._custom.admit(slot, params, prompt_ids, output_ids)
        if not rules.empty:
            self._rules[slot] = rules
        temperature = 1.0 if params.temperature is None else params.temperature
        self._flags[slot] = (
            (_DRAWS if temperature >= GREEDY_BELOW else 0)
            | (0 if rules.empty else _RULES)
            | (_CUSTOM if params.logits_processors else 0)
            | (0 if params.logprobs is None else _LOGPROBS)
        )
        self._positions[slot] = len(token_ids)
        self._min_positions[slot] = prompt_length + params.min_tokens
        self._seeds[slot] = seed
        self._streams[slot] = stream
        self._logprobs[slot] = params.logprobs or 0
        self._temperature[slot] = temperature if temperature >= GREEDY_BELOW else 0.0
        self._top_k[slot] = min(max(0, params.top_k or 0), self.vocab_size)
        self._top_p[slot] = 1.0 if params.top_p is None else params.top_p
        self._min_p[slot] = params.min_p or 0.0

    def fork(self, parent: int, child: int, *, stream: int) -> None:
        """``child`` starts with the parent's parameters and known tokens, and noise of its own.

        Raises:
            Exception: whatever a logits processor's ``admit`` raises for the child, which is then free.
        """
        self.release(child)
        self._custom.fork(parent, child)
        if parent in self._rules:
            self._rules[child] = self._rules[parent].copy()
        for array in self._arrays:
            array[child] = array[parent]
        self._streams[child] = stream

    def release(self, slot: int) -> None:
        """The sequence left ``slot``; nothing happens if it is free already."""
        if self._flags[slot]:
            self._flags[slot] = 0
            self._rules.pop(slot, None)
            self._custom.release(slot)

    def sample(self, logits: torch.Tensor, slots: Int64Array) -> Sampled:
        """Choose one token a row, and advance each row's slot by it.

        Args:
            logits: float32, bfloat16 or float16 [N, V]; they may be changed.
            slots: int64 [N], admitted, each at most once.
        """
        flags = self._flags[slots]
        needed = int(np.bitwise_or.reduce(flags))
        errors: dict[int, str] = {}
        asked = np.flatnonzero(flags & _LOGPROBS) if needed & _LOGPROBS else None
        raw = None if asked is None else raw_logprobs(select_rows(logits, asked))
        if needed & _CHANGES:
            logits = logits.float().contiguous()
            errors = self._change(logits, slots, flags)
        token_ids = self._draw(logits, slots) if needed & _DRAWS else self._kernel.likeliest(logits)
        tokens: list[int] = token_ids.tolist()
        if NO_TOKEN in tokens:
            for row in np.flatnonzero(token_ids == NO_TOKEN).tolist():
                errors.setdefault(row, _diagnosis(logits[row]))
        self._positions[slots] += 1
        if needed & _CHANGES:
            self._advance(slots, flags, tokens, errors)
        for row in errors:
            tokens[row] = 0
        if asked is None or raw is None:
            return Sampled(tokens, None, errors)
        return Sampled(tokens, self._report(raw, asked, slots, tokens, errors), errors)

    @torch.inference_mode()
    def prompt_logprobs(
        self,
        logits: torch.Tensor,
        next_token_ids: Sequence[int],
        count: int,
    ) -> list[PositionLogprobs]:
        """Raw log-probabilities at M positions of a prompt.

        Args:
            logits: [M, V].
            next_token_ids: the prompt's token after each position.
            count: top tokens to report beside that one; -1 = all.
        """
        return prompt_position_logprobs(logits, next_token_ids, count)

    def _change(self, logits: torch.Tensor, slots: Int64Array, flags: Int64Array) -> dict[int, str]:
        """Steps 2 to 7, in place; returns the errors of custom processors by row."""
        rows = np.flatnonzero(flags & _RULES)
        if len(rows):
            ruled = slots[rows]
            early = self._positions[ruled] < self._min_positions[ruled]
            apply_rules(logits, rows.tolist(), [self._rules[slot] for slot in ruled.tolist()], early.tolist())
        rows = np.flatnonzero(flags & _CUSTOM)
        if not len(rows):
            return {}
        greedy = (flags[rows] & _DRAWS) == 0
        return self._custom.apply(logits, rows.tolist(), slots[rows].tolist(), greedy.tolist())

    def _draw(self, logits: torch.Tensor, slots: Int64Array) -> Int64Array:
        """Steps 8 to 11 where at least one row draws."""
        shaping = Shaping(
            self._temperature[slots], self._top_k[slots], self._top_p[slots], self._min_p[slots]
        )
        return self._kernel.draw(
            logits, shaping, uniforms(self._seeds[slots], self._positions[slots], self._streams[slots])
        )

    def _advance(
        self, slots: Int64Array, flags: Int64Array, tokens: list[int], errors: dict[int, str]
    ) -> None:
        """Tell rules and processors of the tokens; rows in error are left alone, others may join them."""
        for row in np.flatnonzero(flags & _CHANGES).tolist():
            if row in errors:
                continue
            slot = int(slots[row])
            if flags[row] & _RULES:
                self._rules[slot].add(tokens[row])
            if flags[row] & _CUSTOM:
                failure = self._custom.advance(slot, tokens[row])
                if failure is not None:
                    errors[row] = failure

    def _report(
        self,
        raw: torch.Tensor,
        asked: Int64Array,
        slots: Int64Array,
        tokens: list[int],
        errors: Mapping[int, str],
    ) -> list[PositionLogprobs | None]:
        """Mappings for the rows that asked; ``raw`` [len(asked), V] belongs to them."""
        rows = asked.tolist()
        counts = self._logprobs[slots[asked]].tolist()
        found = position_logprobs(raw, [tokens[row] for row in rows], counts)
        logprobs: list[PositionLogprobs | None] = [None] * len(tokens)
        for row, mapping in zip(rows, found, strict=True):
            logprobs[row] = None if row in errors else mapping
        return logprobs


def _diagnosis(row: torch.Tensor) -> str:
    """Why no token could be chosen from these logits [V]."""
    if bool(row.isnan().any()):
        return (
            "the model's logits hold NaN, so no token can be chosen: the weights may be damaged, or "
            "values overflow in this dtype (try bfloat16 or float32)"
        )
    if float(row.max()) == -math.inf:
        return (
            "every token is forbidden: allowed_token_ids, bad_words, min_tokens, logit_bias and "
            "logits processors leave none to choose"
        )
    return (
        "the model's logits hold +inf, so no distribution exists: values overflow in this dtype (try float32)"
    )
