"""What is particular to the reference backend; that it computes attention is for ``tests/conformance`` to show."""

from __future__ import annotations

import torch

from kvpage.api.attention import AttentionEnv
from kvpage.builtin.reference_attention import ReferenceAttention


def test_a_block_is_one_contiguous_piece() -> None:
    env = AttentionEnv(
        device="cpu", dtype="float32", kv_dtype="float32", num_heads=4, num_kv_heads=2, head_dim=16, v_head_dim=16,
        block_size=8, num_blocks=5, max_num_seqs=8, max_num_batched_tokens=64, max_model_len=40,
    )  # fmt: skip
    kv = torch.zeros(ReferenceAttention(env).kv_layout().shape)
    assert kv.shape == (5, 2, 2, 8, 16)
    assert kv[3].is_contiguous()


def test_any_head_dim_and_block_size_is_claimed() -> None:
    assert ReferenceAttention.caps.head_dims is None
    assert ReferenceAttention.caps.block_sizes is None
    assert ReferenceAttention.caps.features == {"window", "softcap", "sinks"}
