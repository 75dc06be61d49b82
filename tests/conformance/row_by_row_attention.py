"""A slow attention backend that claims what the reference does not: another layout, narrow V, float8 KV, graphs."""

from __future__ import annotations

import torch

from kvpage.api.attention import (
    AttentionBackend,
    AttentionBatch,
    AttentionCaps,
    AttentionEnv,
    AttentionLayer,
)
from kvpage.api.kv import KVLayout

STORED = {"fp8_e4m3": "float8_e4m3fn"}


class Bucket:
    """The plan of every static step with this many rows: filled again, never made again."""


class RowByRowAttention(AttentionBackend):
    """[NB, bs, Hkv * (D + Dv)], one token after another, K before V; everything in float32, row by row."""

    caps = AttentionCaps(
        devices=frozenset({"cpu"}),
        dtypes=frozenset({"float32", "bfloat16"}),
        kv_dtypes=frozenset({"fp8_e4m3"}),
        head_dims=frozenset({16, 64, 80, 128}),
        block_sizes=frozenset({4, 16}),
        preferred_block_size=16,
        graph="decode",
        features=frozenset({"v_head_dim", "window"}),
    )

    def __init__(self, env: AttentionEnv) -> None:
        super().__init__(env)
        self.buckets: dict[int, Bucket] = {}

    def kv_layout(self) -> KVLayout:
        e = self.env
        width = e.num_kv_heads * (e.head_dim + e.v_head_dim)
        return KVLayout(shape=(e.num_blocks, e.block_size, width), dtype=STORED.get(e.kv_dtype, e.kv_dtype))

    def plan(self, batch: AttentionBatch) -> object:
        return self.buckets.setdefault(batch.num_rows, Bucket()) if batch.static else Bucket()

    def write_kv(self, kv: torch.Tensor, k: torch.Tensor, v: torch.Tensor, batch: AttentionBatch) -> None:
        for token, slot in enumerate(batch.slot_mapping.tolist()):
            if slot >= 0:
                both = torch.cat((k[token].flatten(), v[token].flatten()))
                kv[slot // self.env.block_size, slot % self.env.block_size] = both.to(kv.dtype)

    def attend(
        self,
        q: torch.Tensor,
        kv: torch.Tensor,
        layer: AttentionLayer,
        batch: AttentionBatch,
        plan: object,
        out: torch.Tensor,
    ) -> None:
        e = self.env
        starts, repeat = batch.cu_seqlens_q.tolist(), e.num_heads // e.num_kv_heads
        for row, length in enumerate(batch.seq_lens.tolist()):
            for token in range(starts[row], starts[row + 1] if length else starts[row]):
                position = length - (starts[row + 1] - token)
                first = 0 if layer.window is None else max(0, position - layer.window + 1)
                at = torch.arange(first, position + 1)
                stored = kv[batch.block_tables[row, at // e.block_size].long(), at % e.block_size].float()
                k = stored[:, : e.num_kv_heads * e.head_dim].view(-1, e.num_kv_heads, e.head_dim)
                v = stored[:, e.num_kv_heads * e.head_dim :].view(-1, e.num_kv_heads, e.v_head_dim)
                k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
                weights = (torch.einsum("hd,lhd->hl", q[token].float(), k) * layer.scale).softmax(-1)
                out[token] = torch.einsum("hl,lhd->hd", weights, v).to(out.dtype)

    def copy_blocks(self, kv: torch.Tensor, source: torch.Tensor, target: torch.Tensor) -> None:
        for start, stop in zip(source.tolist(), target.tolist(), strict=True):
            kv[stop] = kv[start].clone()
