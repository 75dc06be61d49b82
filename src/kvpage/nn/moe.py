"""The feed-forward part of a layer: a mixture of experts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
import torch.nn.functional as F

from kvpage.api.model import DecoderEnv, ExpertGroups, MoESpec
from kvpage.api.quant import Dense, LinearKernel, WeightForm
from kvpage.nn.linear import build_linear, dense, make_kernel
from kvpage.nn.mlp import MLP


class MoE:
    """[T, H] -> [T, H], a new tensor: each token's ``top_k`` experts, weighted, plus the shared expert.

    Experts run one after another on the tokens routed to them, in order of expert: a token's sum is formed in
    the same order whatever else is in the batch. It is formed in float32, as transformers does.
    """

    __slots__ = ("_correction", "_experts", "_router", "_shared", "_shared_gate", "_spec")

    def __init__(
        self, spec: MoESpec, weights: Mapping[str, WeightForm], prefix: str, env: DecoderEnv
    ) -> None:
        self._spec = spec
        self._router = _build_router(spec, weights, f"{prefix}.router", env)
        self._correction = dense(weights[f"{prefix}.router.correction"]) if spec.correction else None
        self._experts = [
            MLP(spec.expert, weights, f"{prefix}.experts.{i}", env) for i in range(spec.num_experts)
        ]
        self._shared = None if spec.shared is None else MLP(spec.shared, weights, f"{prefix}.shared", env)
        gated = spec.shared is not None and spec.shared_gate
        self._shared_gate = build_linear(weights, f"{prefix}.shared_gate", env) if gated else None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        scores, experts = self._route(x)
        scores = scores.flatten()
        total = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        for expert, chosen in self._assign(experts):
            rows = chosen // self._spec.top_k
            out = self._experts[expert](x[rows]).mul_(scores[chosen, None])
            total.index_add_(0, rows, out.float())
        routed = total.to(x.dtype)
        if self._shared is not None:
            shared = self._shared(x)
            if self._shared_gate is not None:
                shared = shared.mul_(_sigmoid(self._shared_gate.forward(x)))
            routed.add_(shared)
        return routed

    def _route(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights [T, top_k] of x's dtype, and experts int64 [T, top_k]."""
        logits = self._router.forward(x.float() if self._spec.float32_router else x).float()
        scores = F.softmax(logits, dim=-1) if self._spec.score == "softmax" else _sigmoid(logits)
        ranks = scores if self._correction is None else scores + self._correction
        if self._spec.groups is not None:
            ranks = _within_best_groups(ranks, self._spec.groups)
        experts = ranks.topk(self._spec.top_k, dim=-1).indices
        chosen = scores.gather(1, experts)
        if self._spec.renormalise:
            chosen = chosen / chosen.sum(dim=-1, keepdim=True)
        if self._spec.scale != 1.0:
            chosen = chosen * self._spec.scale
        return chosen.to(x.dtype), experts

    def _assign(self, experts: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
        """Each expert that is used, in order, with the places in ``experts`` (flattened) that name it, in order."""
        flat = experts.flatten()
        counts = flat.bincount(minlength=self._spec.num_experts).tolist()
        places = flat.argsort(stable=True).split(counts)
        for expert, count in enumerate(counts):
            if count:
                yield expert, places[expert]


def _build_router(
    spec: MoESpec, weights: Mapping[str, WeightForm], name: str, env: DecoderEnv
) -> LinearKernel:
    if not spec.float32_router:
        return build_linear(weights, name, env)
    weight = dense(weights[f"{name}.weight"]).float()
    return make_kernel(Dense(weight), None, replace(env, dtype="float32"), name)


def _within_best_groups(ranks: torch.Tensor, groups: ExpertGroups) -> torch.Tensor:
    """``ranks`` [T, experts], -inf for the experts of all groups but each token's best."""
    grouped = ranks.view(ranks.shape[0], groups.count, ranks.shape[1] // groups.count)
    best = grouped.amax(-1) if groups.score == "best" else grouped.topk(2, dim=-1).values.sum(-1)
    taken = torch.zeros_like(best, dtype=torch.bool).scatter_(1, best.topk(groups.chosen).indices, True)
    return grouped.masked_fill(~taken.unsqueeze(-1), -torch.inf).view(ranks.shape)


def _sigmoid(x: torch.Tensor) -> torch.Tensor:
    """Sigmoid as the softmax of (x, 0).

    torch.sigmoid rounds an element by whether its place in the tensor belongs to a whole vector of the processor,
    which depends on the number of rows; a softmax over the last dimension rounds each row alike.
    """
    return torch.stack((x, torch.zeros_like(x)), -1).softmax(-1)[..., 0]
