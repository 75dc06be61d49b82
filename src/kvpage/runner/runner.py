"""ModelRunner: executes step plans on one device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from kvpage.api.model import CausalLM
from kvpage.errors import KvpageError
from kvpage.outputs import PositionLogprobs
from kvpage.params import PoolingParams, SamplingParams
from kvpage.runner.batch import BatchBuilder
from kvpage.runner.kvstore import KVStore
from kvpage.runner.pooling import Pooler
from kvpage.sample.sampler import Sampler
from kvpage.sched.plan import Admission, StepPlan, StepResult

LOGITS_SLICE_BYTES = 64 * 2**20
"""Prompt logprobs are computed in slices whose float32 logits take at most this."""


@dataclass(frozen=True, slots=True)
class PromptLogprobs:
    """A slot whose request asked for prompt_logprobs: how many top tokens, and how long its prompt is."""

    count: int
    prompt_length: int


class ModelRunner:
    """Keeps what plans only change (tokens, tables, sampler state) and runs the model.

    ``execute`` applies a plan in the order of its fields: releases, admissions, block tables, copies; then
    the model, the logits of the rows that want them, forks, the sampler; the pooler takes the rows of prompts
    that become vectors.
    """

    def __init__(
        self, model: CausalLM, store: KVStore, batch: BatchBuilder, sampler: Sampler, vocab_size: int
    ) -> None:
        self._model, self._store, self._batch, self._sampler = model, store, batch, sampler
        self._logits_slice = max(1, LOGITS_SLICE_BYTES // (4 * vocab_size))
        self._pooler = Pooler()
        self._prompt_logprobs: dict[int, PromptLogprobs] = {}
        self._refused: dict[int, str] = {}

    def execute(self, plan: StepPlan) -> StepResult:
        """Run one step; blocks until its tokens are on the host."""
        with torch.inference_mode():
            self._apply(plan)
            inputs = self._batch.build(plan)
            context = self._store.step(inputs.rope_positions, inputs.batches, self._wanted(plan))
            hidden = self._model.forward(inputs.token_ids, inputs.positions, context)
            embeddings, faults = self._pooler.pool(plan, hidden)
            prompt_logprobs = self._score_prompts(plan, hidden)
            result = self._sample(plan, hidden, prompt_logprobs)
        if embeddings:
            result.embeddings = embeddings
            own = len(result.token_ids)
            result.errors = {**result.errors, **{own + index: why for index, why in faults.items()}}
        return result

    def _apply(self, plan: StepPlan) -> None:
        for slot in plan.released:
            self._sampler.release(slot)
            self._pooler.release(slot)
            self._prompt_logprobs.pop(slot, None)
            self._refused.pop(slot, None)
        for admission in plan.admissions:
            if isinstance(admission.params, PoolingParams):
                self._pooler.admit(admission.slot, admission.params)
            else:
                self._admit_to_sampler(admission, admission.params)
        self._batch.apply(plan)
        if plan.copies:
            self._store.copy_blocks(plan.copies)

    def _wanted(self, plan: StepPlan) -> torch.Tensor | None:
        """The tokens whose hidden states are read: the last of each row that samples; ``None`` = all."""
        own = len(plan.sample_rows) - len(plan.forks)
        if own == plan.num_tokens or self._pooler.busy or self._prompt_logprobs:
            return None
        return torch.from_numpy(np.sort(_last_tokens(plan, own)))

    def _admit_to_sampler(self, admission: Admission, params: SamplingParams) -> None:
        try:
            self._sampler.admit(
                admission.slot,
                params,
                seed=admission.seed,
                stream=admission.stream,
                token_ids=admission.token_ids,
                prompt_length=admission.prompt_length,
                bad_word_ids=admission.bad_word_ids,
            )
        except Exception as error:
            # A logits processor's own admit may raise anything: that request ends, the slot samples greedily.
            self._refused[admission.slot] = describe(error)
        if params.prompt_logprobs is not None:
            self._prompt_logprobs[admission.slot] = PromptLogprobs(
                params.prompt_logprobs, admission.prompt_length
            )

    def _sample(
        self, plan: StepPlan, hidden: torch.Tensor, prompt_logprobs: dict[int, Sequence[PositionLogprobs]]
    ) -> StepResult:
        if not plan.sample_rows:
            return StepResult([], prompt_logprobs=prompt_logprobs)
        own = len(plan.sample_rows) - len(plan.forks)
        if own != len(hidden):
            hidden = hidden[torch.from_numpy(_last_tokens(plan, own))]
        logits = self._model.logits(hidden)
        if plan.forks:
            row_of = {row: i for i, row in enumerate(plan.sample_rows[:own])}
            logits = logits[[row_of[row] for row in plan.sample_rows]]
            for fork in plan.forks:
                self._batch.fork(fork.parent, fork.child)
                if fork.parent in self._refused:
                    self._refused[fork.child] = self._refused[fork.parent]
                    continue
                try:
                    self._sampler.fork(fork.parent, fork.child, stream=fork.stream)
                except Exception as error:
                    # As above, for the child alone.
                    self._refused[fork.child] = describe(error)
        slots = np.array(plan.sample_slots, np.int64)
        sampled = self._sampler.sample(logits, slots)
        self._batch.append(slots, sampled.token_ids)
        errors = dict(sampled.errors)
        if self._refused:
            errors.update(
                (i, self._refused[s]) for i, s in enumerate(plan.sample_slots) if s in self._refused
            )
        return StepResult(sampled.token_ids, sampled.logprobs, prompt_logprobs, errors)

    def _score_prompts(self, plan: StepPlan, hidden: torch.Tensor) -> dict[int, Sequence[PositionLogprobs]]:
        """Logprobs of the prompt tokens that this step's positions predict, by row."""
        if not self._prompt_logprobs:
            return {}
        scored: dict[int, Sequence[PositionLogprobs]] = {}
        first = 0
        for row, (slot, start, count) in enumerate(zip(plan.slots, plan.starts, plan.counts, strict=True)):
            wanted = self._prompt_logprobs.get(slot)
            if wanted is not None and start < wanted.prompt_length - 1:
                stop = min(start + count, wanted.prompt_length - 1)
                next_ids = self._batch.tokens[slot, start + 1 : stop + 1].tolist()
                found: list[PositionLogprobs] = []
                for begin in range(0, len(next_ids), self._logits_slice):
                    part = next_ids[begin : begin + self._logits_slice]
                    logits = self._model.logits(hidden[first + begin : first + begin + len(part)])
                    found += self._sampler.prompt_logprobs(logits, part, wanted.count)
                scored[row] = found
            first += count
        return scored


def _last_tokens(plan: StepPlan, own: int) -> npt.NDArray[np.int32]:
    """The last token of each of the first ``own`` rows that sample, in the order of ``sample_rows``."""
    ends = np.cumsum(np.frombuffer(plan.counts, np.int32), dtype=np.int32) - np.int32(1)
    return ends[plan.sample_rows[:own]]


def describe(error: Exception) -> str:
    """An exception in one line; kvpage's own speak for themselves."""
    return str(error) if isinstance(error, KvpageError) else f"{type(error).__name__}: {error}"
