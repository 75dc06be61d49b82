"""The feed-forward part of a layer: one MLP."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F

from kvpage.api.model import DecoderEnv, MLPSpec
from kvpage.api.quant import WeightForm
from kvpage.nn.linear import build_fused, build_linear

# torch computes gelu of a contiguous tensor by oneDNN and of a strided one by itself, with other roundings; a
# single row always counts as contiguous, so all rows are made so.
ACTIVATIONS: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "gelu": lambda x: F.gelu(x.contiguous()),
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square_(),
}

ROWS_AT_ONCE = 512
"""Rows whose inner activations exist at one time: they bound the peak, and stay in the cache."""


class MLP:
    """[T, H] -> [T, H], a new tensor: down(act(gate(x)) * up(x)), or down(act(up(x))) where not gated."""

    __slots__ = ("_act", "_down", "_gated", "_inner")

    def __init__(
        self, spec: MLPSpec, weights: Mapping[str, WeightForm], prefix: str, env: DecoderEnv
    ) -> None:
        self._act = ACTIVATIONS[spec.activation]
        self._gated = spec.gated
        parts = ("gate", "up") if spec.gated else ("up",)
        self._inner = build_fused(weights, [f"{prefix}.{part}" for part in parts], env)
        self._down = build_linear(weights, f"{prefix}.down", env)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[0] <= ROWS_AT_ONCE:
            return self._compute(x)
        return torch.cat([self._compute(rows) for rows in x.split(ROWS_AT_ONCE)])

    def _compute(self, x: torch.Tensor) -> torch.Tensor:
        if self._gated:
            gate, up = self._inner(x)
            return self._down.forward(self._act(gate).mul_(up))
        return self._down.forward(self._act(self._inner(x)[0]))
