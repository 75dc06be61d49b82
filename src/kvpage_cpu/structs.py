"""csrc/abi.h in ctypes, field by field. ``native.ABI_VERSION`` changes with any of these."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_char_p, c_double, c_float, c_int, c_int32, c_int64, c_void_p
from typing import Any

F32, BF16, I8, I4, F8, C4, F16, U8, I16 = range(9)
NO_NORM, RMS, LAYER = range(3)
NORM_OFF, NORM_HEAD, NORM_EACH_HEAD, NORM_ALL = range(4)


class KvpGroupNumbers(ctypes.Structure):
    _fields_ = (
        ("values", c_void_p),
        ("shared", c_void_p),
        ("type", c_int32),
        ("shared_type", c_int32),
        ("per_shared", c_int32),
    )


class KvpLinear(ctypes.Structure):
    _fields_ = (
        ("type", c_int32),
        ("dynamic", c_int32),
        ("outputs", c_int32),
        ("inputs", c_int32),
        ("padded", c_int32),
        ("group", c_int32),
        ("zero", c_int32),
        ("panels", c_void_p),
        ("tail", c_void_p),
        ("output_scales", c_void_p),
        ("scales", KvpGroupNumbers),
        ("zeros", KvpGroupNumbers),
        ("offsets", KvpGroupNumbers),
        ("table", c_void_p),
        ("permutation", c_void_p),
        ("bias", c_void_p),
    )


class KvpNorm(ctypes.Structure):
    _fields_ = (("kind", c_int32), ("eps", c_float), ("weight", c_void_p), ("bias", c_void_p))


class KvpAttention(ctypes.Structure):
    _fields_ = (
        ("kv_type", c_int32),
        ("io_type", c_int32),
        ("heads", c_int32),
        ("kv_heads", c_int32),
        ("head_dim", c_int32),
        ("v_head_dim", c_int32),
        ("block_size", c_int32),
        ("window", c_int32),
        ("scale", c_float),
        ("softcap", c_float),
        ("sinks", c_void_p),
        ("num_rows", c_int32),
        ("cu_seqlens", c_void_p),
        ("seq_lens", c_void_p),
        ("tables", c_void_p),
        ("table_stride", c_int64),
        ("kv", c_void_p),
        ("q", c_void_p),
        ("out", c_void_p),
        ("q_token", c_int64),
        ("q_head", c_int64),
        ("out_token", c_int64),
        ("out_head", c_int64),
    )


class KvpMlp(ctypes.Structure):
    _fields_ = (
        ("up", KvpLinear * 2),
        ("num_up", c_int32),
        ("down", KvpLinear),
        ("activation", c_int32),
        ("gated", c_int32),
    )


class KvpMixture(ctypes.Structure):
    _fields_ = (
        ("num_experts", c_int32),
        ("top_k", c_int32),
        ("sigmoid", c_int32),
        ("renormalise", c_int32),
        ("scale", c_float),
        ("groups", c_int32),
        ("chosen_groups", c_int32),
        ("best_two", c_int32),
        ("router", KvpLinear),
        ("correction", c_void_p),
        ("experts", POINTER(KvpMlp)),
        ("has_shared", c_int32),
        ("has_shared_gate", c_int32),
        ("shared", KvpMlp),
        ("shared_gate", KvpLinear),
    )


class KvpRope(ctypes.Structure):
    _fields_ = (
        ("cos", c_void_p),
        ("sin", c_void_p),
        ("positions", c_void_p),
        ("rotary_dim", c_int32),
        ("interleaved", c_int32),
    )


class KvpLayer(ctypes.Structure):
    _fields_ = (
        ("mixer_before", KvpNorm),
        ("mixer_after", KvpNorm),
        ("ffn_before", KvpNorm),
        ("ffn_after", KvpNorm),
        ("q_norm", KvpNorm),
        ("k_norm", KvpNorm),
        ("qkv", KvpLinear * 3),
        ("num_qkv", c_int32),
        ("out", KvpLinear),
        ("mlp", KvpMlp),
        ("mixture", POINTER(KvpMixture)),
        ("heads", c_int32),
        ("kv_heads", c_int32),
        ("head_dim", c_int32),
        ("v_head_dim", c_int32),
        ("qk_norm", c_int32),
        ("window", c_int32),
        ("scale", c_float),
        ("softcap", c_float),
        ("sinks", c_void_p),
        ("rotary_dim", c_int32),
        ("interleaved", c_int32),
        ("kv_group", c_int32),
        ("parallel", c_int32),
        ("multiplier", c_float),
    )


class KvpModel(ctypes.Structure):
    _fields_ = (
        ("num_layers", c_int32),
        ("hidden", c_int32),
        ("vocab", c_int32),
        ("kv_type", c_int32),
        ("layers", POINTER(KvpLayer)),
        ("table", c_void_p),
        ("table_type", c_int32),
        ("embed_scale", c_float),
        ("packed_table", KvpLinear),
        ("positions", c_void_p),
        ("positions_type", c_int32),
        ("position_offset", c_int32),
        ("final_norm", KvpNorm),
        ("head", KvpLinear),
        ("head_scale", c_float),
        ("head_softcap", c_float),
    )


class KvpGroup(ctypes.Structure):
    _fields_ = (
        ("num_rows", c_int32),
        ("block_size", c_int32),
        ("cu_seqlens", c_void_p),
        ("seq_lens", c_void_p),
        ("tables", c_void_p),
        ("table_stride", c_int64),
        ("slots", c_void_p),
    )


class KvpStep(ctypes.Structure):
    _fields_ = (
        ("num_tokens", c_int32),
        ("num_wanted", c_int32),
        ("token_ids", c_void_p),
        ("positions", c_void_p),
        ("rope_positions", c_void_p),
        ("groups", POINTER(KvpGroup)),
        ("kv", POINTER(c_void_p)),
        ("cos", POINTER(c_void_p)),
        ("sin", POINTER(c_void_p)),
        ("wanted", c_void_p),
        ("hidden", c_void_p),
    )


class KvpSampling(ctypes.Structure):
    _fields_ = (
        ("type", c_int32),
        ("num_rows", c_int32),
        ("vocab_size", c_int32),
        ("logits", c_void_p),
        ("logits_stride", c_int64),
        ("temperature", c_void_p),
        ("top_k", c_void_p),
        ("top_p", c_void_p),
        ("min_p", c_void_p),
        ("uniforms", c_void_p),
        ("token_ids", c_void_p),
    )


SIGNATURES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "kvp_abi_version": (c_int, ()),
    "kvp_best_isa": (c_int, ()),
    "kvp_isa_name": (c_char_p, (c_int,)),
    "kvp_open": (c_void_p, (c_int, c_int)),
    "kvp_close": (None, (c_void_p,)),
    "kvp_pack": (c_int, (c_void_p, POINTER(KvpLinear), c_void_p, c_int64)),
    "kvp_linear": (
        c_int,
        (c_void_p, POINTER(KvpLinear), c_int64, c_void_p, c_int32, c_int64, c_void_p, c_int32, c_int64),
    ),
    "kvp_read_rows": (c_int, (c_void_p, POINTER(KvpLinear), c_int64, c_void_p, c_void_p)),
    "kvp_attend": (c_int, (c_void_p, POINTER(KvpAttention))),
    "kvp_write_kv": (
        c_int,
        (
            c_void_p,
            POINTER(KvpAttention),
            c_void_p,
            c_int64,
            c_int64,
            c_void_p,
            c_int64,
            c_int64,
            c_void_p,
            c_int64,
        ),
    ),
    "kvp_rope_write": (
        c_int,
        (
            c_void_p,
            POINTER(KvpAttention),
            POINTER(KvpRope),
            c_void_p,
            c_int64,
            c_int64,
            c_void_p,
            c_int64,
            c_int64,
            c_void_p,
            c_int64,
        ),
    ),
    "kvp_block_bytes": (c_int64, (c_int32, c_int32, c_int32, c_int32, c_int32)),
    "kvp_step": (c_int, (c_void_p, POINTER(KvpModel), POINTER(KvpStep))),
    "kvp_logits": (c_int, (c_void_p, POINTER(KvpModel), c_int64, c_void_p, c_void_p)),
    "kvp_sample": (c_int, (c_void_p, POINTER(KvpSampling))),
    "kvp_read_bandwidth": (c_double, (c_void_p, c_void_p, c_int64)),
}
"""Exported function -> (result, arguments)."""
