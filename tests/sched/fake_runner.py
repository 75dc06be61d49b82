"""A runner that keeps, instead of K and V, the tokens that a slot of a block was computed from, and by which rope.

It applies plans exactly as ``StepPlan`` says, and before a row computes anything it compares what the row's
blocks hold with the sequence's own tokens: a stale prefix hit, a missed copy, a wrong fork or K and V of the other
rope fails right there.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from zlib import crc32

from kvpage.cache.tables import GroupConfig
from kvpage.outputs import Logprob, PositionLogprobs
from kvpage.params import Pooling, PoolingParams
from kvpage.sched.plan import StepPlan, StepResult

Draw = Callable[[int, int, int, list[int]], int]
"""(seed, position, stream, known tokens) -> the next token."""


def state_of(token_ids: list[int]) -> float:
    """The hidden state of the last of these tokens; sums of a few are exact in float32."""
    return float(crc32(repr(token_ids).encode()) % 1000)


def vector_of(pooling: Pooling, prompt: list[int]) -> array[float]:
    """The embedding of a prompt that is computed alone; the mean is left as a sum, which is exact."""
    positions = range(1, len(prompt) + 1) if pooling == "mean" else [len(prompt)]
    return array("f", [sum(state_of(prompt[:end]) for end in positions)])


@dataclass
class Seat:
    """What the runner keeps for a slot; ``pooled``: the state of each position, as it was computed."""

    token_ids: list[int]
    prompt_length: int
    seed: int
    stream: int
    wants_prompt_logprobs: bool
    tables: list[dict[int, int]]
    long_rope: bool
    pooling: Pooling | None = None
    pooled: list[float] = field(default_factory=list)


@dataclass
class FakeRunner:
    """Executes plans over fake memory: ``memory[group][block, offset]`` = rope, tokens up to and with that position."""

    block_size: int
    groups: Sequence[GroupConfig]
    draw: Draw
    max_tokens: int
    max_slots: int
    rope_switch: int | None = None
    seats: dict[int, Seat] = field(default_factory=dict)
    memory: list[dict[tuple[int, int], tuple[bool, tuple[int, ...]]]] = field(default_factory=list)
    rows_seen: list[list[tuple[int, int, int]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.memory = [{} for _ in self.groups]

    def execute(self, plan: StepPlan) -> StepResult:
        """Apply ``plan`` in the order of its fields and draw the tokens it asks for."""
        self._seat(plan)
        self._edit_tables(plan)
        self._copy(plan)
        self._check_shape(plan)
        rows = list(zip(plan.slots, plan.starts, plan.counts, strict=True))
        self.rows_seen.append(rows)
        for slot, start, count in rows:  # the K/V of all rows is written before any row attends
            self._write(slot, start, count)
        for slot, start, count in rows:
            self._expect_own_history(slot, start + count)
        return self._sample(plan, rows)

    def execute_with_garbage(self, plan: StepPlan) -> None:
        """Apply ``plan``, but compute nonsense: what a step that fails half-way leaves behind."""
        self._seat(plan)
        self._edit_tables(plan)
        self._copy(plan)
        for slot, start, count in zip(plan.slots, plan.starts, plan.counts, strict=True):
            for group in range(len(self.groups)):
                for position in range(start, start + count):
                    index, offset = divmod(position, self.block_size)
                    self.memory[group][self.seats[slot].tables[group][index], offset] = (False, (-1,))

    def _seat(self, plan: StepPlan) -> None:
        for slot in plan.released:
            self.seats.pop(slot, None)
        for admission in plan.admissions:
            assert admission.slot not in self.seats, f"slot {admission.slot} is taken"
            assert 0 <= admission.slot < self.max_slots
            self.seats[admission.slot] = Seat(
                list(admission.token_ids),
                admission.prompt_length,
                admission.seed,
                admission.stream,
                admission.params.prompt_logprobs is not None
                and admission.stream == 0
                and len(admission.token_ids) == admission.prompt_length,
                [{} for _ in self.groups],
                admission.long_rope,
                admission.params.pooling if isinstance(admission.params, PoolingParams) else None,
            )
        for fork in plan.forks:
            assert fork.child not in self.seats, f"slot {fork.child} is taken"
            assert 0 <= fork.child < self.max_slots
            parent = self.seats[fork.parent]
            self.seats[fork.child] = Seat(
                list(parent.token_ids),
                parent.prompt_length,
                parent.seed,
                fork.stream,
                False,
                [{} for _ in self.groups],
                parent.long_rope,
            )

    def _edit_tables(self, plan: StepPlan) -> None:
        edits = zip(plan.table_slots, plan.table_groups, plan.table_indices, plan.table_blocks, strict=True)
        for slot, group, index, block in edits:
            assert 0 <= block < self.groups[group].num_blocks
            self.seats[slot].tables[group][index] = block

    def _copy(self, plan: StepPlan) -> None:
        targets = {(copy.group, copy.target) for copy in plan.copies}
        sources = {(copy.group, copy.source) for copy in plan.copies}
        assert not targets & sources, "copies of one step must not depend on each other"
        assert len(targets) == len(plan.copies), "two copies to one block"
        for copy in plan.copies:
            memory = self.memory[copy.group]
            for offset in range(self.block_size):
                content = memory.get((copy.source, offset))
                if content is not None:
                    memory[copy.target, offset] = content

    def _check_shape(self, plan: StepPlan) -> None:
        assert len(set(plan.slots)) == len(plan.slots), "a slot has two rows"
        assert plan.num_tokens == sum(plan.counts) <= self.max_tokens
        assert all(count == 1 for count in plan.counts[: plan.num_short])
        assert all(count > 1 for count in plan.counts[plan.num_short :])
        assert len(plan.num_logits) == len(plan.counts)

    def _write(self, slot: int, start: int, count: int) -> None:
        seat = self.seats[slot]
        for group, config in enumerate(self.groups):
            for position in range(start, start + count):
                index, offset = divmod(position, self.block_size)
                block = seat.tables[group].get(index, 0)
                assert block, f"{config.kind} group: position {position} has no block"
                place = (block, offset)
                self.memory[group][place] = (seat.long_rope, tuple(seat.token_ids[: position + 1]))

    def _expect_own_history(self, slot: int, end: int) -> None:
        seat = self.seats[slot]
        assert end <= len(seat.token_ids)
        long = self.rope_switch is not None and len(seat.token_ids) > self.rope_switch
        assert seat.long_rope == long, (
            f"slot {slot}: {len(seat.token_ids)} tokens, long rope {seat.long_rope}"
        )
        start = next(s for s_slot, s, _ in self.rows_seen[-1] if s_slot == slot)
        for group, config in enumerate(self.groups):
            first = 0 if config.window is None else max(0, start - config.window + 1)
            for position in range(first, end):
                index, offset = divmod(position, self.block_size)
                block = seat.tables[group].get(index, 0)
                assert block, f"{config.kind} group: position {position} has no block"
                found = self.memory[group].get((block, offset))
                wanted = (long, tuple(seat.token_ids[: position + 1]))
                assert found == wanted, f"slot {slot}, position {position}: {found} instead of {wanted}"

    def _sample(self, plan: StepPlan, rows: list[tuple[int, int, int]]) -> StepResult:
        ends = {}
        prompt_logprobs: dict[int, list[PositionLogprobs]] = {}
        for row, (slot, start, count) in enumerate(rows):
            seat = self.seats[slot]
            ends[row] = start + count
            seat.pooled += [state_of(seat.token_ids[: end + 1]) for end in range(start, start + count)]
            if seat.wants_prompt_logprobs and start < seat.prompt_length:
                assert plan.num_logits[row] == count
                tokens = seat.token_ids[start + 1 : min(start + count + 1, seat.prompt_length)]
                prompt_logprobs[row] = [{token: Logprob(-1.0, 1)} for token in tokens]
            else:
                assert plan.num_logits[row] == (row in plan.sample_rows)
        drawn = []
        for row, slot in zip(plan.sample_rows, plan.sample_slots, strict=True):
            seat = self.seats[slot]
            assert ends[row] == len(seat.token_ids), "a token is drawn before all known ones are computed"
            assert seat.pooling is None, "a token is drawn for a prompt that becomes a vector"
            drawn.append(self.draw(seat.seed, len(seat.token_ids), seat.stream, seat.token_ids))
        for slot, token in zip(plan.sample_slots, drawn, strict=True):
            self.seats[slot].token_ids.append(token)
        vectors = [
            self._pool(slot, start + count) for slot, start, count in map(rows.__getitem__, plan.pool_rows)
        ]
        return StepResult(drawn, prompt_logprobs=prompt_logprobs, embeddings=vectors)

    def _pool(self, slot: int, end: int) -> array[float]:
        seat = self.seats[slot]
        assert end == len(seat.token_ids), "a vector is made before all of the prompt is computed"
        assert seat.pooling is not None, "a vector is made for a sequence that draws tokens"
        return array("f", [sum(seat.pooled) if seat.pooling == "mean" else seat.pooled[-1]])
