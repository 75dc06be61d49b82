"""Attention of one layer: projections and norms here, rope, KV cache and softmax behind ``ctx.attend``."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from kvpage.api.model import AttentionSpec, DecoderEnv, StepContext
from kvpage.api.quant import WeightForm
from kvpage.nn.linear import build_fused, build_linear, dense
from kvpage.nn.norm import Norm, build_norm


class Attention:
    """The mixer that an ``AttentionSpec`` describes: x [T, H] -> [T, H], a new tensor."""

    __slots__ = ("_k_norm", "_norm_heads", "_out", "_q_norm", "_qkv", "_sinks", "_spec")

    def __init__(
        self, spec: AttentionSpec, weights: Mapping[str, WeightForm], prefix: str, env: DecoderEnv
    ) -> None:
        self._spec = spec
        self._qkv = build_fused(weights, [f"{prefix}.{part}" for part in ("q", "k", "v")], env)
        self._out = build_linear(weights, f"{prefix}.out", env)
        self._q_norm: Norm | None = None
        self._k_norm: Norm | None = None
        self._norm_heads = spec.qk_norm is not None and spec.qk_norm.over != "all"
        if spec.qk_norm is not None:
            self._q_norm = build_norm(spec.qk_norm.norm, weights, f"{prefix}.q_norm")
            self._k_norm = build_norm(spec.qk_norm.norm, weights, f"{prefix}.k_norm")
        self._sinks = dense(weights[f"{prefix}.sinks"]).float() if spec.sinks else None

    def __call__(self, x: torch.Tensor, positions: torch.Tensor, ctx: StepContext) -> torch.Tensor:
        spec, rows = self._spec, x.shape[0]
        q, k, v = self._qkv(x)
        if self._q_norm is not None and self._k_norm is not None and not self._norm_heads:
            q, k = self._q_norm(q), self._k_norm(k)
        q = q.view(rows, spec.num_heads, spec.head_dim)
        k = k.view(rows, spec.num_kv_heads, spec.head_dim)
        if self._q_norm is not None and self._k_norm is not None and self._norm_heads:
            q, k = self._q_norm(q), self._k_norm(k)
        v = v.view(rows, spec.num_kv_heads, spec.v_head_dim)
        attended = ctx.attend(spec, q, k, v, self._sinks)
        return self._out.forward(attended.reshape(rows, spec.num_heads * spec.v_head_dim))
