"""The feed-forward part of a layer: a mixture of experts."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F

from kvpage.api.model import DecoderEnv, MoESpec
from kvpage.api.quant import WeightForm
from kvpage.nn.linear import build_linear
from kvpage.nn.mlp import MLP


class MoE:
    """[T, H] -> [T, H], a new tensor: each token's ``top_k`` experts, weighted, plus the shared expert.

    Experts run one after another on the tokens routed to them, in order of expert: a token's sum is formed in
    the same order whatever else is in the batch.
    """

    __slots__ = ("_experts", "_router", "_shared", "_shared_gate", "_spec")

    def __init__(
        self, spec: MoESpec, weights: Mapping[str, WeightForm], prefix: str, env: DecoderEnv
    ) -> None:
        self._spec = spec
        self._router = build_linear(weights, f"{prefix}.router", env)
        self._experts = [
            MLP(spec.expert, weights, f"{prefix}.experts.{i}", env) for i in range(spec.num_experts)
        ]
        self._shared = None if spec.shared is None else MLP(spec.shared, weights, f"{prefix}.shared", env)
        gated = spec.shared is not None and spec.shared_gate
        self._shared_gate = build_linear(weights, f"{prefix}.shared_gate", env) if gated else None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        scores, experts = self._route(x)
        out = torch.zeros_like(x)
        for expert in experts.unique().tolist():
            rows, place = torch.where(experts == expert)
            out.index_add_(0, rows, self._experts[expert](x[rows]) * scores[rows, place, None])
        if self._shared is not None:
            shared = self._shared(x)
            if self._shared_gate is not None:
                shared = shared.mul_(self._shared_gate.forward(x).sigmoid_())
            out.add_(shared)
        return out

    def _route(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights [T, top_k] of x's dtype, and experts int64 [T, top_k]."""
        logits = self._router.forward(x).float()
        scores = F.softmax(logits, dim=-1) if self._spec.score == "softmax" else logits.sigmoid_()
        chosen, experts = scores.topk(self._spec.top_k, dim=-1)
        if self._spec.renormalise:
            chosen = chosen / chosen.sum(dim=-1, keepdim=True)
        if self._spec.scale != 1.0:
            chosen = chosen * self._spec.scale
        return chosen.to(x.dtype), experts
