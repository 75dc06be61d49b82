"""A small attention backend: it gathers each row's keys and values and calls torch's attention.

KV layout, one tensor a layer, token-major so that a slot number is an index::

    [NB, bs, 2, Hkv, D]      [:, :, 0] = K, [:, :, 1] = V;  slot = block * bs + offset
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import cast

import torch
import torch.nn.functional as F

from kvpage.api.attention import AttentionBackend, AttentionBatch, AttentionCaps, AttentionLayer
from kvpage.api.kv import KVLayout


@dataclass(slots=True)
class Row:
    """One row of the step.

    Attributes:
        first, last: its tokens in the step.
        start: position of its first token in the sequence.
        slots: int64 [seq_len], where each of its keys lies.
        seen: by window, what ``visible`` found.
    """

    first: int
    last: int
    start: int
    slots: torch.Tensor
    seen: dict[int | None, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    def visible(self, window: int | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Slots of the keys that some query sees [K], and which query sees which: bool [queries, K].

        Made for the first layer that has this window. Keys behind the window are left out, not masked: their
        blocks may belong to others by now, and 0 * NaN is NaN.
        """
        if window not in self.seen:
            device = self.slots.device
            oldest = 0 if window is None else max(0, self.start - window + 1)
            queries = torch.arange(self.start, self.start + self.last - self.first, device=device)[:, None]
            keys = torch.arange(oldest, len(self.slots), device=device)[None, :]
            mask = keys <= queries
            if window is not None:
                mask &= keys > queries - window
            self.seen[window] = (self.slots[oldest:], mask)
        return self.seen[window]


class GatherAttention(AttentionBackend):
    """Rows one after another, each as if it were alone: its result cannot depend on the batch."""

    caps = AttentionCaps(
        devices=frozenset({"cpu", "cuda"}),
        dtypes=frozenset({"float32", "bfloat16", "float16"}),
        features=frozenset({"window"}),  # what is not named here (softcap, sinks) we are never asked for
    )

    def kv_layout(self) -> KVLayout:
        e = self.env
        return KVLayout(shape=(e.num_blocks, e.block_size, 2, e.num_kv_heads, e.head_dim), dtype=e.kv_dtype)

    def plan(self, batch: AttentionBatch) -> list[Row]:
        size = self.env.block_size
        starts = batch.cu_seqlens_q.tolist()
        rows = []
        # The lengths on the device are exact; those on the host are only upper bounds.
        for index, length in enumerate(batch.seq_lens.tolist()):
            first, last = starts[index], starts[index + 1]
            if length == 0 or first == last:
                continue  # a padding row
            position = torch.arange(length, device=batch.block_tables.device)
            slots = batch.block_tables[index].long()[position // size] * size + position % size
            rows.append(Row(first, last, length - (last - first), slots))
        return rows

    def write_kv(self, kv: torch.Tensor, k: torch.Tensor, v: torch.Tensor, batch: AttentionBatch) -> None:
        tokens = (batch.slot_mapping >= 0).nonzero().squeeze(1)  # -1 is padding: it must not be written
        slots = batch.slot_mapping[tokens]
        by_slot = kv.view(-1, *kv.shape[2:])
        by_slot[slots, 0] = k[tokens].to(kv.dtype)
        by_slot[slots, 1] = v[tokens].to(kv.dtype)

    def attend(
        self,
        q: torch.Tensor,
        kv: torch.Tensor,
        layer: AttentionLayer,
        batch: AttentionBatch,
        plan: object,
        out: torch.Tensor,
    ) -> None:
        by_slot = kv.view(-1, *kv.shape[2:])
        for row in cast("list[Row]", plan):
            slots, mask = row.visible(layer.window)
            gathered = by_slot[slots].to(q.dtype)  # [K, 2, Hkv, D]
            k, v = gathered[:, 0].transpose(0, 1)[None], gathered[:, 1].transpose(0, 1)[None]
            queries = q[row.first : row.last].transpose(0, 1)[None]
            result = F.scaled_dot_product_attention(
                queries, k, v, attn_mask=mask, scale=layer.scale, enable_gqa=True
            )
            out[row.first : row.last] = result[0].transpose(0, 1)

    def copy_blocks(self, kv: torch.Tensor, source: torch.Tensor, target: torch.Tensor) -> None:
        kv[target] = kv[source]
