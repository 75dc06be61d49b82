"""Multi-head latent attention of one layer, its keys and values expanded before they are cached."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from kvpage.api.model import AttentionSpec, DecoderEnv, NormSpec, StepContext
from kvpage.api.quant import WeightForm
from kvpage.nn.linear import build_linear
from kvpage.nn.norm import build_norm


class LatentAttention:
    """x [T, H] -> [T, H], a new tensor. The rotated elements of a head come first, as ``rotate`` wants them."""

    __slots__ = ("_dims", "_kv_a", "_kv_a_norm", "_kv_b", "_out", "_queries", "_spec")

    def __init__(
        self,
        spec: AttentionSpec,
        dims: tuple[int, int, int],
        weights: Mapping[str, WeightForm],
        env: DecoderEnv,
        *,
        eps: float,
    ) -> None:
        """``dims``: elements of a head that turn, of its key that do not, of its value."""
        norm = NormSpec(kind="rms", eps=eps)
        self._spec, self._dims = spec, dims
        self._queries = _build_queries(weights, env, norm)
        self._kv_a = build_linear(weights, "kv_a", env)
        self._kv_a_norm = build_norm(norm, weights, "kv_a_norm")
        self._kv_b = build_linear(weights, "kv_b", env)
        self._out = build_linear(weights, "out", env)

    def __call__(self, x: torch.Tensor, positions: torch.Tensor, ctx: StepContext) -> torch.Tensor:
        rope, nope, value = self._dims
        rows, heads, width = x.shape[0], self._spec.num_heads, self._spec.head_dim
        q = x.new_zeros((rows, heads, width))
        k, v = torch.zeros_like(q), torch.zeros_like(q)
        still, turning = self._queries(x).view(rows, heads, nope + rope).split((nope, rope), -1)
        q[..., :rope], q[..., rope : rope + nope] = turning, still
        compressed = self._kv_a.forward(x)
        latent = self._kv_a_norm(compressed[:, :-rope].contiguous())
        expanded = self._kv_b.forward(latent).view(rows, heads, nope + value)
        k[..., :rope] = compressed[:, None, -rope:]
        k[..., rope : rope + nope] = expanded[..., :nope]
        v[..., :value] = expanded[..., nope:]
        attended = ctx.attend(self._spec, q, k, v)[..., :value]
        return self._out.forward(attended.reshape(rows, heads * value))


def _build_queries(
    weights: Mapping[str, WeightForm], env: DecoderEnv, norm: NormSpec
) -> Callable[[torch.Tensor], torch.Tensor]:
    """x [T, H] -> [T, heads * (nope + rope)], through a latent where there is one."""
    if "q.weight" in weights:
        return build_linear(weights, "q", env).forward
    narrow, wide = build_linear(weights, "q_a", env), build_linear(weights, "q_b", env)
    q_a_norm = build_norm(norm, weights, "q_a_norm")
    return lambda x: wide.forward(q_a_norm(narrow.forward(x)))
