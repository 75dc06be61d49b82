"""Conformance of attention backends, memory: what may be read, what may be written, and how inputs may lie."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from kvpage.testing.attention_rig import Options, Row, Step
from kvpage.testing.attention_rope import ROPES, STRIDES, rope_step, rope_tables, strided
from kvpage.testing.attention_subject import AttentionSubject


class AttentionMemory(AttentionSubject):
    """The cache and the inputs: canaries, NaN, padding, strides, shared and scrambled blocks, copies."""

    def axes(self) -> dict[str, Sequence[Any]]:
        return {**super().axes(), "rope": ROPES, "strides": STRIDES}

    def test_padding_rows_change_nobody(self) -> None:
        """Rows of length 0, with or without tokens, and tokens after the last row: the others get the same numbers."""
        rig, rows = self.mixed()
        pads = [Row(None, 0, 1), Row(None, 0, 1)]
        mixed = [*rows[:3], pads[0], *rows[3:8], Row(None, 0, 0), *rows[8:], Row(None, 0, 4)]
        for padded, trailing in (([*rows[:5], *pads], 0), (mixed, 3), ([pads[0], *rows[:5]], 0)):
            self.check("padding", rig, rig.step(padded, rig.layer(), Options(trailing=trailing)))

    def test_row_without_queries_changes_nobody(self) -> None:
        """A row that has KV but no token in this step is passed over."""
        rig, rows = self.mixed()
        idle = Row(0, rows[0].last, rows[0].last)
        self.check("row without queries", rig, rig.step([*rows[1:6], idle, *rows[6:]], rig.layer()))

    def test_unused_slots_may_hold_anything(self) -> None:
        """NaN and then huge values in the null block, in others' blocks and in tails of last blocks: not read."""
        size = self.shape().block_size
        for filling in (0xFF, 0x7E):
            rig = self.rig([1, size + 1, 2 * size - 1, 3 * size + 2])
            rig.kv[0].view(torch.uint8).fill_(filling)
            rows = [
                Row(0, 0, 1),
                Row(1, size, size + 1),
                Row(2, size - 1, 2 * size - 1),
                Row(3, 1, 3 * size + 2),
            ]
            self.check("unused slots", rig, rig.step(rows, rig.layer()))

    def test_blocks_behind_the_window_may_belong_to_others(self) -> None:
        """A block that fell behind one row's window is another's now, filled in the same step."""
        size = self.shape().block_size
        rig = self.rig([4 * size + 2, size], features={"window"})
        rig.fill([Row(0, 4 * size + 1, 4 * size + 2)])
        rig.tables[1] = rig.tables[0][:1]
        rig.written[1] = 0
        width = size + 1
        rows = [Row(0, 4 * size + 1, 4 * size + 2), Row(1, 0, size)]
        self.check("window", rig, rig.step(rows, rig.layer(window=width), Options(behind_window=width)))

    def test_strided_inputs(self, strides: str) -> None:
        """q, k and v as views: of one fused projection, of heads with room between, V as a part of K's tensor."""
        rig, rows = self.mixed()
        rig.fill(rows)
        batch = rig.batch(rows, Options(strided_table=True))
        plan = rig.backend.plan(batch)
        q, k, v = strided(strides, *rig.inputs(rows))
        rig.backend.write_kv(rig.kv[0], k, v, batch)
        rig.note_written(rows)
        step = Step(rows, batch, [rig.layer()])
        rig.attend(step, q, rig.kv[0], rig.layer(), plan)
        self.check(f"strided inputs ({strides})", rig, step)

    def test_shared_blocks(self) -> None:
        """Several rows whose tables begin with the same blocks, as after a prefix hit or a fork."""
        size = self.shape().block_size
        rig = self.rig([3 * size + 1, 3 * size + 2, 2 * size + 5, 2 * size])
        for borrower, blocks in ((1, 3), (2, 2), (3, 2)):
            rig.share(0, borrower, blocks)
        rig.fill([Row(0, 3 * size, 3 * size + 1)])
        rig.written[1], rig.written[2], rig.written[3] = 3 * size, 2 * size, 2 * size - 1
        rows = [Row(0, 3 * size, 3 * size + 1), Row(3, 2 * size - 1, 2 * size)]
        rows += [Row(1, 3 * size, 3 * size + 2), Row(2, 2 * size, 2 * size + 5)]
        self.check("shared blocks", rig, rig.step(rows, rig.layer()))

    def test_shared_blocks_filled_in_the_same_step(self) -> None:
        """One row fills blocks that another, in either order, reads in the same step: all write before any attends."""
        size = self.shape().block_size
        for turned in (False, True):
            rig = self.rig([2 * size + 3, 2 * size + 2, 2 * size + 1])
            rig.share(0, 1, 2)
            rig.share(0, 2, 2)
            rig.written[1] = rig.written[2] = 2 * size
            rows = [Row(2, 2 * size, 2 * size + 1), Row(0, 0, 2 * size + 3), Row(1, 2 * size, 2 * size + 2)]
            step = rig.step(rows[::-1] if turned else rows, rig.layer())
            self.check("shared blocks filled in the same step", rig, step)

    def test_block_tables_in_any_order(self) -> None:
        """Blocks in descending, ascending and scrambled order, and far apart: only the table says where they are."""
        size = self.shape().block_size
        lengths = [3 * size + 2, 4 * size, 2 * size + 1]
        for order in ("scrambled", "descending", "ascending"):
            rig = self.rig(lengths, seed=3)
            if order != "scrambled":
                blocks = sorted((b for table in rig.tables for b in table), reverse=order == "descending")
                rig.tables = [[blocks.pop(0) for _ in table] for table in rig.tables]
            rows = [Row(0, lengths[0] - 1, lengths[0]), Row(1, 1, lengths[1]), Row(2, size - 1, lengths[2])]
            self.check(f"block tables ({order})", rig, rig.step(rows, rig.layer()))

    def test_wide_block_tables(self) -> None:
        """Tables wider than any row needs, zeros at the end, and rows of the table apart in memory."""
        rig, rows = self.mixed()
        for options in (Options(extra_columns=5), Options(extra_columns=130, strided_table=True)):
            self.check("block tables (wide)", rig, rig.step(rows, rig.layer(), options))

    def test_host_lengths_are_upper_bounds(self) -> None:
        """q_lens_host, seq_lens_host and both maxima may be too large; only the device's lengths are the truth."""
        rig, rows = self.mixed()
        for slack in (1, rig.size, 3 * rig.size + 1):
            self.check(
                "host lengths are upper bounds", rig, rig.step(rows, rig.layer(), Options(slack=slack))
            )

    def test_copied_block_is_a_block_of_its_own(self) -> None:
        """Copy-on-write: after a copy the child writes its own last block, and the parent still reads its own."""
        size = self.shape().block_size
        length = size + max(1, size // 2)
        rig = self.rig([length + 1, length + 1])
        rig.share(0, 1, 1)
        for tensors in (rig.k[0], rig.v[0]):
            tensors[1][:length] = tensors[0][:length]
        rig.fill([Row(0, length, length + 1)])
        # The rows end in the middle of a block, which only the parent has; block size 1 has no such middle.
        source, target = (torch.tensor([rig.tables[s][length // size]], device=rig.device) for s in (0, 1))
        if length % size:
            rig.backend.copy_blocks(rig.kv[0], source, target)
            rig.written[1] = length
        else:
            rig.written[1] = size
        rows = [Row(0, length, length + 1), Row(1, length, length + 1)]
        self.check("copy_blocks", rig, rig.step(rows, rig.layer()))

    def test_rope_write(self, rope: str, dtype: str) -> None:
        """rope_write is rotate, rounded once from float32, then write_kv; also fused, partial, interleaved, strided."""
        for strides in ("contiguous", "fused-qkv"):
            rig, rows = self.mixed(self.shape(dtype=dtype))
            step = rope_step(rig, rows, [rope_tables(rope, rig)], strides, rope)
            self.check(f"rope_write ({rope})", rig, step)
