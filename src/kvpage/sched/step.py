"""A step on its way through the scheduler, and what it brought."""

from __future__ import annotations

from array import array
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field

from kvpage.outputs import PositionLogprobs
from kvpage.sched.plan import StepPlan
from kvpage.sched.sequence import Request, Sequence


@dataclass(slots=True)
class Commit:
    """What a step brought.

    Attributes:
        sequences, token_ids: parallel: who gained a token, and which. Each is appended already.
        logprobs: parallel too; ``None`` if nobody asked.
        finished: sequences that ended in this commit, with finish_reason and stop_reason (or error) set. No
            sequence is ever named twice, here or by ``abort`` and ``expire``.
        prompt_logprobs: requests whose prompt is computed now, with one entry a prompt token (the first ``None``).
        embeddings: requests that wanted a vector, and have it now; each is among ``finished`` too.
    """

    sequences: SequenceOf[Sequence]
    token_ids: SequenceOf[int]
    logprobs: SequenceOf[PositionLogprobs | None] | None = None
    finished: list[Sequence] = field(default_factory=list)
    prompt_logprobs: list[tuple[Request, list[PositionLogprobs | None]]] = field(default_factory=list)
    embeddings: list[tuple[Request, array[float]]] = field(default_factory=list)


@dataclass(slots=True)
class Step:
    """A plan that is being made or is under way, and whose rows it has.

    Attributes:
        short, long: the rows in the plan's order: those of one token, then the others.
        forked: sequences that split off in this step, parallel to ``plan.forks``.
        samplers: who draws a token, parallel to ``plan.sample_slots``.
        poolers: whose prompt becomes a vector, parallel to ``plan.pool_rows``.
        published: (group, block) that may be hit on the promise that this step fills them.
        partial: whether a row may end before its sequence's last known token, and so draws nothing.
        prompted: whether a row wants the logits of all its positions (prompt_logprobs).
        pooled: whether a row is of a sequence that draws nothing, but ends with its vector.
        preempted: whether a sequence lost its blocks to this step.
    """

    plan: StepPlan
    short: list[Sequence]
    long: list[Sequence] = field(default_factory=list)
    forked: list[Sequence] = field(default_factory=list)
    samplers: list[Sequence] = field(default_factory=list)
    poolers: list[Sequence] = field(default_factory=list)
    published: list[tuple[int, int]] = field(default_factory=list)
    partial: bool = False
    prompted: bool = False
    pooled: bool = False
    preempted: bool = False

    @property
    def sequences(self) -> list[Sequence]:
        """Everyone with tokens in flight."""
        return [*self.short, *self.long, *self.forked]

    def fill_rows(self) -> None:
        """Write the plan's rows and who draws a token from which."""
        plan, short = self.plan, self.short
        rows = short + self.long
        for sequence in short:
            sequence.in_flight = 1
        plan.num_short = len(short)
        plan.slots = array("i", [s.slot for s in rows])
        plan.starts = array("i", [s.computed for s in rows])
        if not (self.partial or self.long or self.forked or self.pooled):
            ones = array("i", (1,)) * len(rows)
            plan.counts, plan.num_logits = ones, ones[:]
            plan.num_tokens = len(rows)
            plan.sample_rows = array("i", range(len(rows)))
            plan.sample_slots = plan.slots[:]
            self.samplers = rows
            return
        plan.counts = array("i", [s.in_flight for s in rows])
        plan.num_tokens = sum(plan.counts)
        row_of: dict[int, int] = {}
        for row, s in enumerate(rows):
            complete = s.computed + s.in_flight == len(s.token_ids)
            draws = complete and s.pooling is None
            plan.num_logits.append(s.in_flight if s.prompt_logprobs is not None else int(draws))
            if draws:
                row_of[s.slot] = row
                plan.sample_rows.append(row)
                self.samplers.append(s)
            elif complete:
                plan.pool_rows.append(row)
                self.poolers.append(s)
        for fork in plan.forks:
            plan.sample_rows.append(row_of[fork.parent])
        self.samplers += self.forked
        plan.sample_slots = array("i", [s.slot for s in self.samplers])
