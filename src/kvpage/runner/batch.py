"""StepPlan -> model inputs and one AttentionBatch a KV group, in persistent buffers.

Per-slot state (numpy; address space only until touched) lives here because plans carry changes, not state::

    tokens  [slots, max_model_len]   known token ids        lengths [slots]   how many
    tables  a group [slots, blocks]  block of each logical block
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from kvpage.api.attention import AttentionBatch
from kvpage.sched.plan import StepPlan

Ints = npt.NDArray[np.integer]


@dataclass(frozen=True, slots=True)
class StepInputs:
    """What one step computes: token_ids, positions, rope_positions int64 [T]; one AttentionBatch a KV group.

    ``rope_positions``: the row of the rotary tables by which each token turns.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    rope_positions: torch.Tensor
    batches: Sequence[AttentionBatch]


class BatchBuilder:
    """Applies plans to the per-slot state and builds each step's inputs.

    Args:
        max_num_seqs: slots. max_num_batched_tokens: most tokens of a step.
        max_model_len: most tokens of a sequence. block_size: tokens a block. num_groups: KV groups.
        rope_switch: rows of the rotary tables before those of long sequences; ``None`` = there are none of these.
    """

    def __init__(
        self,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        block_size: int,
        num_groups: int,
        rope_switch: int | None = None,
    ) -> None:
        blocks = -(-max_model_len // block_size)
        self._block_size = block_size
        self.tokens = np.zeros((max_num_seqs, max_model_len + 1), np.int32)
        self.lengths = np.zeros(max_num_seqs, np.int64)
        self.tables = [np.zeros((max_num_seqs, blocks), np.int32) for _ in range(num_groups)]
        self._token_ids = np.zeros(max_num_batched_tokens, np.int64)
        self._positions = np.zeros(max_num_batched_tokens, np.int64)
        self._slot_mappings = [np.zeros(max_num_batched_tokens, np.int64) for _ in range(num_groups)]
        self._cu_seqlens = np.zeros(max_num_seqs + 1, np.int32)
        self._cu_short = np.arange(max_num_seqs + 1, dtype=np.int32)  # where each row has one token
        self._seq_lens = np.zeros(max_num_seqs, np.int32)
        self._rope_switch = rope_switch or 0
        self._rope_offsets = np.zeros(max_num_seqs, np.int64)
        # Positions themselves where a model has one rope.
        self._rope_positions = self._positions if rope_switch is None else np.zeros_like(self._positions)

    def apply(self, plan: StepPlan) -> None:
        """Admissions and block-table entries of ``plan``. A released slot needs nothing: admission overwrites it."""
        for admission in plan.admissions:
            count = len(admission.token_ids)
            self.tokens[admission.slot, :count] = admission.token_ids
            self.lengths[admission.slot] = count
            self._rope_offsets[admission.slot] = self._rope_switch * admission.long_rope
        if plan.table_slots:
            if len(self.tables) == 1:
                self.tables[0][plan.table_slots, plan.table_indices] = plan.table_blocks
            else:
                groups = np.asarray(plan.table_groups)
                entries = [np.asarray(a) for a in (plan.table_slots, plan.table_indices, plan.table_blocks)]
                for group, table in enumerate(self.tables):
                    slots, indices, blocks = (a[groups == group] for a in entries)
                    table[slots, indices] = blocks

    def fork(self, parent: int, child: int) -> None:
        """The child's known tokens start as the parent's, and so does its rope."""
        self._rope_offsets[child] = self._rope_offsets[parent]
        count = self.lengths[parent]
        self.tokens[child, :count] = self.tokens[parent, :count]
        self.lengths[child] = count

    def append(self, slots: Ints, token_ids: Sequence[int]) -> None:
        """One sampled token a slot joins its known tokens."""
        self.tokens[slots, self.lengths[slots]] = token_ids
        self.lengths[slots] += 1

    def build(self, plan: StepPlan) -> StepInputs:
        """Inputs of the planned step; valid until the next call."""
        slots, starts = np.frombuffer(plan.slots, np.int32), np.frombuffer(plan.starts, np.int32)
        counts = np.frombuffer(plan.counts, np.int32)
        rows, total = len(slots), plan.num_tokens
        token_ids, positions = self._token_ids[:total], self._positions[:total]
        lengths = np.add(starts, counts, out=self._seq_lens[:rows])
        seq_lens_host = lengths.tolist()
        longest = max(seq_lens_host)
        if plan.num_short == rows:
            slot_of_token, cu_seqlens = slots, self._cu_short
            positions[:] = starts
        else:
            cu_seqlens = self._cu_seqlens
            np.cumsum(counts, out=cu_seqlens[1 : rows + 1])
            slot_of_token = slots.repeat(counts)
            first = starts - cu_seqlens[:rows]
            np.add(np.arange(total), first.repeat(counts), out=positions)
        token_ids[:] = self.tokens[slot_of_token, positions]
        rope_positions = self._rope_positions[:total]
        if self._rope_switch:
            np.add(positions, self._rope_offsets[slot_of_token], out=rope_positions)
        block, offset = np.divmod(positions, self._block_size)
        used = -(-longest // self._block_size)
        cu_seqlens_q = torch.from_numpy(cu_seqlens[: rows + 1])
        seq_lens = torch.from_numpy(lengths)
        batches = []
        for table, mapping in zip(self.tables, self._slot_mappings, strict=True):
            slot_mapping = mapping[:total]
            np.multiply(table[slot_of_token, block], self._block_size, out=slot_mapping)
            slot_mapping += offset
            batches.append(
                AttentionBatch(
                    num_tokens=total,
                    num_rows=rows,
                    num_short=plan.num_short,
                    cu_seqlens_q=cu_seqlens_q,
                    seq_lens=seq_lens,
                    block_tables=torch.from_numpy(table[slots, :used]),
                    slot_mapping=torch.from_numpy(slot_mapping),
                    q_lens_host=plan.counts,
                    seq_lens_host=seq_lens_host,
                    max_query_len=1 if plan.num_short == rows else int(counts.max()),
                    max_seq_len=longest,
                )
            )
        tokens, places, turns = map(torch.from_numpy, (token_ids, positions, rope_positions))
        return StepInputs(tokens, places, turns, batches)
