"""Reference attention in plain torch: any block size, dtype and head dim; the truth other backends are held to.

KV layout, one tensor a layer, block-major so that a block is one contiguous piece::

    [NB, 2, Hkv, bs, D]      [:, 0] = K, [:, 1] = V;  block 0 is the null block

Short rows (one query) are grouped by KV length rounded up to a power of two of blocks, gathered and computed
together; a row's arithmetic depends on its own length alone, so its result does not depend on its batch mates.
Prompt chunks are computed row by row, in tiles of queries. Scores and softmax are float32.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import cast

import torch

from kvpage.api.attention import (
    AttentionBackend,
    AttentionBatch,
    AttentionCaps,
    AttentionEnv,
    AttentionLayer,
    Rope,
)
from kvpage.api.kv import KVLayout

QUERY_TILE = 128
"""Queries of a chunk computed at once: bounds the score matrix at Hq * 128 * L floats."""


@dataclass(slots=True)
class ShortGroup:
    """Short rows padded to one number n of blocks (L = n * bs keys).

    Attributes:
        tokens: int64 [b], each row's token in the step; ``None`` where the group is the whole step in order.
        pieces: int64 [2 * b * Hkv * n], rows of the KV tensor seen as [NB * 2 * Hkv, bs * D].
        dead: bool [b, 1, 1, L], True where a key must not be seen.
        last: int64 [b], which of the n blocks holds the row's last token.
        tail: bool [b, 1, bs, 1], unused slots of that block.
    """

    tokens: torch.Tensor | None
    pieces: torch.Tensor
    dead: torch.Tensor
    last: torch.Tensor
    tail: torch.Tensor


@dataclass(slots=True)
class Chunk:
    """One row with several queries: tokens [first, last) of the step, at positions start .. start+count-1."""

    first: int
    last: int
    start: int
    blocks: torch.Tensor


@dataclass(slots=True)
class Plan:
    """Short groups and chunks by window, filled the first time a layer with that window attends."""

    short: dict[int | None, list[ShortGroup]] = field(default_factory=dict)
    chunks: list[Chunk] = field(default_factory=list)


class ReferenceAttention(AttentionBackend):
    """See the module. Rows are computed as if each were alone."""

    caps = AttentionCaps(
        devices=frozenset({"cpu", "cuda"}),
        dtypes=frozenset({"float32", "bfloat16", "float16"}),
        features=frozenset({"window", "softcap", "sinks"}),
    )

    def __init__(self, env: AttentionEnv) -> None:
        super().__init__(env)
        self._turns: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._writes: tuple[torch.Tensor | None, torch.Tensor, torch.Tensor] | None = None

    def kv_layout(self) -> KVLayout:
        e = self.env
        return KVLayout(shape=(e.num_blocks, 2, e.num_kv_heads, e.block_size, e.head_dim), dtype=e.kv_dtype)

    def plan(self, batch: AttentionBatch) -> Plan:
        self._turns = {}
        slots = batch.slot_mapping
        kept = None
        if bool((slots < 0).any()):
            kept = (slots >= 0).nonzero().squeeze(1)
            slots = slots[kept]
        self._writes = (kept, slots // self.env.block_size, slots % self.env.block_size)
        plan = Plan()
        starts = batch.cu_seqlens_q.tolist()
        lengths = batch.seq_lens.tolist()
        for row in range(batch.num_rows):
            first, last = starts[row], starts[row + 1]
            if last - first > 1 and lengths[row]:
                used = -(-lengths[row] // self.env.block_size)
                blocks = batch.block_tables[row, :used].to(torch.int64)
                plan.chunks.append(Chunk(first, last, lengths[row] - (last - first), blocks))
        return plan

    def write_kv(self, kv: torch.Tensor, k: torch.Tensor, v: torch.Tensor, batch: AttentionBatch) -> None:
        assert self._writes is not None, "plan() comes before write_kv()"
        kept, blocks, offsets = self._writes
        if kept is not None:
            k, v = k[kept], v[kept]
        kv[blocks, 0, :, offsets] = k.to(kv.dtype)
        kv[blocks, 1, :, offsets] = v.to(kv.dtype)

    def rope_write(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        positions: torch.Tensor,
        rope: Rope | None,
        kv: torch.Tensor,
        batch: AttentionBatch,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if rope is None or rope.interleaved or rope.rotary_dim != q.shape[-1]:
            return super().rope_write(q, k, v, positions, rope, kv, batch)
        # The whole head turns: x * cos + roll(x, D/2) * (-sin, sin), with cos and sin gathered once a step.
        tables = self._turns.get(id(rope))
        if tables is None:
            cos, sin = rope.cos[positions], rope.sin[positions]
            tables = (torch.cat((cos, cos), -1).unsqueeze(1), torch.cat((-sin, sin), -1).unsqueeze(1))
            self._turns[id(rope)] = tables
        cos, sin = tables
        half = rope.rotary_dim // 2
        q = (q * cos + q.roll(half, -1) * sin).to(q.dtype)
        k = (k * cos + k.roll(half, -1) * sin).to(k.dtype)
        self.write_kv(kv, k, v, batch)
        return q, k

    def attend(
        self,
        q: torch.Tensor,
        kv: torch.Tensor,
        layer: AttentionLayer,
        batch: AttentionBatch,
        plan: object,
        out: torch.Tensor,
    ) -> None:
        steps = cast(Plan, plan)
        groups = steps.short.get(layer.window)
        if groups is None:
            groups = steps.short[layer.window] = self._group_short_rows(batch, layer.window)
        for group in groups:
            self._attend_short(q, kv, layer, group, out)
        for chunk in steps.chunks:
            self._attend_chunk(q, kv, layer, chunk, out)

    def copy_blocks(self, kv: torch.Tensor, source: torch.Tensor, target: torch.Tensor) -> None:
        kv[target] = kv[source]

    def _group_short_rows(self, batch: AttentionBatch, window: int | None) -> list[ShortGroup]:
        """Rows with one query, grouped by the power of two that their number of visible blocks rounds up to."""
        bs = self.env.block_size
        q_lens = batch.cu_seqlens_q.diff()
        lengths = batch.seq_lens.to(torch.int64)
        short = ((q_lens == 1) & (lengths > 0)).nonzero().squeeze(1)
        if not short.numel():
            return []
        oldest = torch.zeros_like(lengths) if window is None else (lengths - window).clamp_(min=0)
        first = oldest // bs
        visible = (lengths - 1) // bs - first + 1
        sizes = [1 << (n - 1).bit_length() for n in visible[short].tolist()]
        groups = []
        for size in sorted(set(sizes)):
            members = short[torch.tensor([s == size for s in sizes], device=short.device)]
            groups.append(self._short_group(batch, members, first, oldest, lengths, size))
        return groups

    def _short_group(
        self,
        batch: AttentionBatch,
        rows: torch.Tensor,
        first: torch.Tensor,
        oldest: torch.Tensor,
        lengths: torch.Tensor,
        size: int,
    ) -> ShortGroup:
        bs, heads = self.env.block_size, self.env.num_kv_heads
        device = rows.device
        first, oldest, length = (
            first[rows].unsqueeze(1),
            oldest[rows].unsqueeze(1),
            lengths[rows].unsqueeze(1),
        )
        last = (length - 1) // bs - first
        index = torch.arange(size, device=device)
        # Padding reads the row's first block again: its slots are all written, and masked below.
        logical = first + index.where(index <= last, 0)
        blocks = batch.block_tables[rows.unsqueeze(1), logical].to(torch.int64)
        piece = torch.tensor([0, heads], device=device).view(2, 1, 1, 1)
        head = torch.arange(heads, device=device).view(1, 1, heads, 1)
        pieces = blocks.view(1, -1, 1, size) * (2 * heads) + piece + head
        keys = ((first + index) * bs).unsqueeze(2) + torch.arange(bs, device=device)
        keys = keys.flatten(1)
        dead = (keys >= length) | (keys < oldest)
        tail = ((first + last) * bs + torch.arange(bs, device=device)) >= length
        everyone = len(rows) == batch.num_rows == batch.num_tokens
        return ShortGroup(
            tokens=None if everyone else batch.cu_seqlens_q[:-1][rows].to(torch.int64),
            pieces=pieces.flatten(),
            dead=dead[:, None, None, :],
            last=last.squeeze(1),
            tail=tail[:, None, :, None],
        )

    def _attend_short(
        self, q: torch.Tensor, kv: torch.Tensor, layer: AttentionLayer, group: ShortGroup, out: torch.Tensor
    ) -> None:
        e = self.env
        batch, length = group.dead.shape[0], group.dead.shape[-1]
        rows = q if group.tokens is None else q[group.tokens]
        flat = kv.view(-1, e.block_size * e.head_dim)
        gathered = flat.index_select(0, group.pieces).view(2, batch, e.num_kv_heads, length, e.head_dim)
        k, v = gathered[0].float(), gathered[1].float()
        # 0 * NaN is NaN: what unused slots hold must not reach the sum over values.
        by_block = v.view(batch, e.num_kv_heads, -1, e.block_size, e.head_dim)
        row = torch.arange(batch, device=v.device)
        by_block[row, :, group.last] = by_block[row, :, group.last].masked_fill(group.tail, 0.0)
        queries = rows.float().reshape(batch, e.num_kv_heads, -1, e.head_dim)
        scores = torch.matmul(queries, k.transpose(-1, -2)).mul_(layer.scale)
        weights = softmax(scores, group.dead, layer, (1, e.num_kv_heads, -1, 1))
        result = torch.matmul(weights, v).view(batch, e.num_heads, e.head_dim)
        if group.tokens is None:
            out.copy_(result)
        else:
            out[group.tokens] = result.to(out.dtype)

    def _attend_chunk(
        self, q: torch.Tensor, kv: torch.Tensor, layer: AttentionLayer, chunk: Chunk, out: torch.Tensor
    ) -> None:
        e = self.env
        bs, count = e.block_size, chunk.last - chunk.first
        end = chunk.start + count
        begin = 0 if layer.window is None else max(0, chunk.start - layer.window + 1) // bs
        gathered = kv[chunk.blocks[begin:]].permute(1, 2, 0, 3, 4).flatten(2, 3)
        keys = gathered[..., : end - begin * bs, :].float()
        offset = begin * bs
        for tile in range(0, count, QUERY_TILE):
            stop = min(tile + QUERY_TILE, count)
            seen = chunk.start + stop - offset
            lowest = 0 if layer.window is None else max(0, chunk.start + tile - layer.window + 1 - offset)
            k, v = keys[0, :, lowest:seen], keys[1, :, lowest:seen]
            rows = q[chunk.first + tile : chunk.first + stop].float()
            queries = rows.view(stop - tile, e.num_kv_heads, -1, e.head_dim).permute(1, 2, 0, 3)
            scores = torch.matmul(queries, k.transpose(-1, -2).unsqueeze(1)).mul_(layer.scale)
            at = torch.arange(chunk.start + tile, chunk.start + stop, device=q.device).unsqueeze(1)
            key = torch.arange(offset + lowest, offset + seen, device=q.device)
            dead = key > at
            if layer.window is not None:
                dead |= key <= at - layer.window
            weights = softmax(scores, dead, layer, (e.num_kv_heads, -1, 1, 1))
            result = torch.matmul(weights, v.unsqueeze(1)).permute(2, 0, 1, 3).flatten(1, 2)
            out[chunk.first + tile : chunk.first + stop] = result.to(out.dtype)


def softmax(
    scores: torch.Tensor, dead: torch.Tensor, layer: AttentionLayer, sinks_shape: tuple[int, ...]
) -> torch.Tensor:
    """Softmax of float32 scores over their last dimension after softcap, mask and sinks; may reuse ``scores``.

    ``sinks_shape``: how sinks [Hq] broadcast to scores.
    """
    if layer.softcap is not None:
        scores = scores.div_(layer.softcap).tanh_().mul_(layer.softcap)
    scores = scores.masked_fill_(dead, -torch.inf)
    if layer.sinks is None:
        return scores.softmax(-1)
    sinks = layer.sinks.float().view(sinks_shape)
    top = torch.maximum(scores.amax(-1, keepdim=True), sinks)
    weights = (scores - top).exp_()
    return weights.div_(weights.sum(-1, keepdim=True) + (sinks - top).exp())
