"""The native attention backend: paged attention of decode rows and prompt chunks on the CPU."""

from __future__ import annotations

import ctypes
from typing import ClassVar

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
from kvpage_cpu.native import Context
from kvpage_cpu.structs import BF16, F32, I8, KvpAttention, KvpRope

HEAD_DIMS = frozenset(range(8, 513, 8))
"""Elements a head, of K and of V, that the kernels take."""
TYPES = {"float32": F32, "bfloat16": BF16, "int8": I8}
"""Numbers of csrc/abi.h by torch dtype name."""


def kv_type_of(dtype: str) -> int:
    """The number of a cache's dtype in csrc/abi.h."""
    return TYPES[dtype]


class CpuAttention(AttentionBackend):
    """Attention by native kernels for the processor's best instruction set, or the one ``KVPAGE_CPU_ISA`` names.

    A query's result has the same bits whatever its batch mates, its chunk and the number of threads are. A cache in
    bfloat16 or int8 is multiplied in bfloat16 with sums in float32, one in float32 wholly in float32. int8: every
    token's K and V have a scale a head (their largest magnitude / 127), which takes 8 bytes a token and KV head.

    KV layout, blocks of bytes::

        [NB, bytes of a block], see KvpAttention in csrc/abi.h

    Raises:
        NativeLibraryError: the native library is missing or stale.
    """

    caps: ClassVar[AttentionCaps] = AttentionCaps(
        devices=frozenset({"cpu"}),
        dtypes=frozenset({"float32", "bfloat16"}),
        kv_dtypes=frozenset({"int8"}),
        head_dims=HEAD_DIMS,
        block_sizes=frozenset({16, 32, 64, 128, 256}),
        preferred_block_size=32,
        features=frozenset({"window", "softcap", "sinks", "v_head_dim"}),
    )

    def __init__(self, env: AttentionEnv) -> None:
        super().__init__(env)
        self._context = Context()
        self._template = KvpAttention(
            kv_type=kv_type_of(env.kv_dtype),
            io_type=TYPES[env.dtype],
            heads=env.num_heads,
            kv_heads=env.num_kv_heads,
            head_dim=env.head_dim,
            v_head_dim=env.v_head_dim,
            block_size=env.block_size,
        )

    def kv_layout(self) -> KVLayout:
        e = self.env
        size = self._context.library.kvp_block_bytes(
            self._template.kv_type, e.num_kv_heads, e.head_dim, e.v_head_dim, e.block_size
        )
        return KVLayout(shape=(e.num_blocks, size), dtype="uint8")

    def plan(self, batch: AttentionBatch) -> KvpAttention:
        """The call's fields that the layers of a step have in common."""
        call = KvpAttention.from_buffer_copy(self._template)
        call.num_rows = batch.num_rows
        call.cu_seqlens = batch.cu_seqlens_q.data_ptr()
        call.seq_lens = batch.seq_lens.data_ptr()
        call.tables, call.table_stride = batch.block_tables.data_ptr(), batch.block_tables.stride(0)
        return call

    def write_kv(self, kv: torch.Tensor, k: torch.Tensor, v: torch.Tensor, batch: AttentionBatch) -> None:
        context, call = self._context, self._template
        call.kv = kv.data_ptr()
        context.check(
            context.library.kvp_write_kv(
                context.handle,
                ctypes.byref(call),
                k.data_ptr(),
                k.stride(0),
                k.stride(1),
                v.data_ptr(),
                v.stride(0),
                v.stride(1),
                batch.slot_mapping.data_ptr(),
                batch.num_tokens,
            )
        )

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
        """Rotates q and k in place."""
        if rope is None or not (rope.cos.is_contiguous() and rope.sin.is_contiguous()):
            return super().rope_write(q, k, v, positions, rope, kv, batch)
        context, call = self._context, self._template
        call.kv, call.q = kv.data_ptr(), q.data_ptr()
        call.q_token, call.q_head = q.stride(0), q.stride(1)
        turn = KvpRope(
            cos=rope.cos.data_ptr(),
            sin=rope.sin.data_ptr(),
            positions=positions.data_ptr(),
            rotary_dim=rope.rotary_dim,
            interleaved=rope.interleaved,
        )
        context.check(
            context.library.kvp_rope_write(
                context.handle,
                ctypes.byref(call),
                ctypes.byref(turn),
                k.data_ptr(),
                k.stride(0),
                k.stride(1),
                v.data_ptr(),
                v.stride(0),
                v.stride(1),
                batch.slot_mapping.data_ptr(),
                batch.num_tokens,
            )
        )
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
        assert isinstance(plan, KvpAttention)
        call, context = plan, self._context
        sinks = None if layer.sinks is None else layer.sinks.float().contiguous()
        call.scale, call.softcap, call.window = layer.scale, layer.softcap or 0.0, layer.window or 0
        call.sinks = None if sinks is None else sinks.data_ptr()
        call.kv, call.q, call.out = kv.data_ptr(), q.data_ptr(), out.data_ptr()
        call.q_token, call.q_head = q.stride(0), q.stride(1)
        call.out_token, call.out_head = out.stride(0), out.stride(1)
        context.check(context.library.kvp_attend(context.handle, ctypes.byref(call)))

    def copy_blocks(self, kv: torch.Tensor, source: torch.Tensor, target: torch.Tensor) -> None:
        kv[target] = kv[source]
