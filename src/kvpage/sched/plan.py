"""StepPlan and StepResult: what the scheduler asks of a step, and what comes back.

Both are plain data (picklable), so that every rank of a tensor-parallel engine can be given the same plan.
Token ids travel once, when a sequence takes its slot; after that the runner appends what it sampled itself.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from kvpage.api.kv import BlockCopy
from kvpage.outputs import PositionLogprobs
from kvpage.params import Params


def int_array() -> array[int]:
    return array("i")


@dataclass(slots=True)
class Admission:
    """A sequence takes a slot: everything the runner keeps for it until ``StepPlan.released`` names the slot.

    Attributes:
        token_ids: all known tokens: the prompt and, after a preemption, what was generated since.
        prompt_length: how many of them are prompt.
        seed, stream: key of the sampling noise; stream = index of the choice.
        bad_word_ids: ``params.bad_words``, tokenised.
        long_rope: whether it is longer than ``SchedulerConfig.rope_switch``; a fork is what its parent is.
    """

    slot: int
    token_ids: Sequence[int]
    prompt_length: int
    params: Params
    seed: int
    stream: int
    bad_word_ids: Sequence[Sequence[int]] = ()
    long_rope: bool = False


@dataclass(slots=True)
class Fork:
    """``child`` starts as a copy of ``parent``'s known tokens and draws its own token from the same logits."""

    parent: int
    child: int
    stream: int


@dataclass(slots=True)
class StepPlan:
    """One step, as a struct of arrays (``array('i')``). The runner applies it in the order of the fields.

    Attributes:
        step: counts up from 0.
        released: slots whose sequence ended or was preempted since the last plan.
        admissions: sequences that take a slot with this step.
        table_slots, table_groups, table_indices, table_blocks: block-table entries to set:
            ``table[group][slot][index] = block``. An entry of a full block never changes, but to 0 (the null
            block) once it fell behind a window.
        copies: blocks to copy before anything is written (copy-on-write).
        slots, starts, counts: the rows: ``counts[i]`` tokens of the sequence on ``slots[i]`` from position
            ``starts[i]``. Rows are short-first; [0, num_short) compute one token.
        num_logits: positions of the row whose logits are needed, counted from its end: 0 (more of the prompt is
            to come, or nothing is drawn), 1, or all (prompt_logprobs).
        forks: n > 1: sequences that split off after this step's logits.
        sample_rows, sample_slots: token i of the result is drawn for ``sample_slots[i]`` from the last logits
            of row ``sample_rows[i]``; forked children come last.
        pool_rows: rows that end the prompt of a request with PoolingParams: embedding i of the result is that of
            row ``pool_rows[i]``.
    """

    step: int
    released: array[int] = field(default_factory=int_array)
    admissions: list[Admission] = field(default_factory=list)
    table_slots: array[int] = field(default_factory=int_array)
    table_groups: array[int] = field(default_factory=int_array)
    table_indices: array[int] = field(default_factory=int_array)
    table_blocks: array[int] = field(default_factory=int_array)
    copies: list[BlockCopy] = field(default_factory=list)
    slots: array[int] = field(default_factory=int_array)
    starts: array[int] = field(default_factory=int_array)
    counts: array[int] = field(default_factory=int_array)
    num_logits: array[int] = field(default_factory=int_array)
    num_short: int = 0
    num_tokens: int = 0
    forks: list[Fork] = field(default_factory=list)
    sample_rows: array[int] = field(default_factory=int_array)
    sample_slots: array[int] = field(default_factory=int_array)
    pool_rows: array[int] = field(default_factory=int_array)


@dataclass(slots=True)
class StepResult:
    """What a step computed.

    Attributes:
        token_ids: one a ``StepPlan.sample_slots`` entry.
        logprobs: one mapping a sampled token, ``None`` where not asked for; ``None`` if nobody asked.
        prompt_logprobs: row -> one mapping a prompt token that the row's positions predicted.
        errors: index into ``token_ids``, continued by ``embeddings`` -> why that sequence alone cannot go on.
        embeddings: one a ``StepPlan.pool_rows`` entry, float32.
    """

    token_ids: Sequence[int]
    logprobs: Sequence[PositionLogprobs | None] | None = None
    prompt_logprobs: Mapping[int, Sequence[PositionLogprobs]] = field(default_factory=dict)
    errors: Mapping[int, str] = field(default_factory=dict)
    embeddings: Sequence[array[float]] = ()
