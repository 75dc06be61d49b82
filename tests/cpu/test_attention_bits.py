"""A query's result has the same bits whatever the number of threads and its chunk are, also where keys are split."""

from __future__ import annotations

import pytest
import torch

from kvpage.api.attention import AttentionBatch, AttentionEnv, AttentionLayer
from kvpage_cpu.attention import CpuAttention

LENGTH, CHUNK = 2600, 70
HEADS, DIM, BLOCK = 16, 64, 32


def backend(kv_dtype: str, threads: int, monkeypatch: pytest.MonkeyPatch) -> CpuAttention:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    return CpuAttention(
        AttentionEnv(
            device="cpu", dtype="float32", kv_dtype=kv_dtype, num_heads=HEADS, num_kv_heads=1, head_dim=DIM,
            v_head_dim=DIM, block_size=BLOCK, num_blocks=LENGTH // BLOCK + 2, max_num_seqs=1,
            max_num_batched_tokens=LENGTH, max_model_len=LENGTH,
        )
    )  # fmt: skip


def batch(first: int, last: int) -> AttentionBatch:
    """Tokens first .. last-1 of the one sequence, whose blocks are 1, 2, 3 ..."""
    return AttentionBatch(
        num_tokens=last - first,
        num_rows=1,
        num_short=0,
        cu_seqlens_q=torch.tensor([0, last - first], dtype=torch.int32),
        seq_lens=torch.tensor([last], dtype=torch.int32),
        block_tables=torch.arange(1, LENGTH // BLOCK + 2, dtype=torch.int32).unsqueeze(0),
        slot_mapping=torch.arange(first + BLOCK, last + BLOCK),
    )


def attend(made: CpuAttention, kv: torch.Tensor, q: torch.Tensor, first: int, last: int) -> torch.Tensor:
    step = batch(first, last)
    out = torch.empty_like(q)
    made.attend(q, kv, AttentionLayer(index=0, scale=0.2), step, made.plan(step), out)
    return out


@pytest.mark.parametrize("kv_dtype", ["float32", "bfloat16", "int8"])
def test_threads_and_chunks_change_no_bit(kv_dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(3)
    alone, together = (backend(kv_dtype, threads, monkeypatch) for threads in (1, 3))
    k, v = (torch.randn((LENGTH, 1, DIM), generator=generator) for _ in range(2))
    q = torch.randn((CHUNK, HEADS, DIM), generator=generator)
    kv = torch.zeros(alone.kv_layout().shape, dtype=torch.uint8)
    together.write_kv(kv, k, v, batch(0, LENGTH))
    wanted = attend(alone, kv, q, LENGTH - CHUNK, LENGTH)
    assert torch.equal(attend(together, kv, q, LENGTH - CHUNK, LENGTH), wanted)
    for at in (0, 37, CHUNK - 1):
        position = LENGTH - CHUNK + at
        for made in (alone, together):
            assert torch.equal(attend(made, kv, q[at : at + 1], position, position + 1), wanted[at : at + 1])
