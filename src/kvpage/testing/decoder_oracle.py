"""A decoder in float64, written to be read: dense attention over one whole sequence, straight from a DecoderSpec.

L tokens of a sequence, H hidden size. It shares no code with kvpage's own decoder.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from kvpage.api.model import AttentionSpec, DecoderSpec, LayerSpec, MLPSpec, MoESpec, NormSpec, RopeSpec
from kvpage.api.quant import WeightForm

Weights = Mapping[str, torch.Tensor]


def exact_weights(weights: Mapping[str, WeightForm]) -> dict[str, torch.Tensor]:
    """Every parameter in float64 on the CPU, exactly as its form stands for it."""
    return {name: form.dequantize().cpu().double() for name, form in weights.items()}


def exact_hidden(spec: DecoderSpec, weights: Weights, token_ids: list[int]) -> torch.Tensor:
    """float64 [L, H], after the final norm, of one sequence from position 0."""
    positions = torch.arange(len(token_ids), device="cpu")
    hidden = weights["embed.weight"][token_ids] * spec.embedding.scale
    if spec.embedding.positions is not None:
        hidden = hidden + weights["positions.weight"][positions + spec.embedding.position_offset]
    for index, layer in enumerate(spec.layers):
        hidden = _layer(layer, weights, f"layers.{index}", hidden, positions)
    return _norm(spec.final_norm, weights, "final_norm", hidden)


def exact_logits(spec: DecoderSpec, weights: Weights, hidden: torch.Tensor) -> torch.Tensor:
    """float64 [N, V] of hidden states [N, H]."""
    logits = hidden @ weights["head.weight" if "head.weight" in weights else "embed.weight"].t()
    if spec.head.bias:
        logits = logits + weights["head.bias"]
    logits = logits * spec.head.scale
    cap = spec.head.softcap
    return logits if cap is None else cap * torch.tanh(logits / cap)


def rope_angles(spec: RopeSpec, positions: torch.Tensor) -> torch.Tensor:
    """float64 [L, rotary_dim / 2] of a rope of kind "default" (RoFormer, arXiv:2104.09864)."""
    if spec.kind != "default":
        raise ValueError(f"the oracle computes ropes of kind 'default', not {spec.kind!r}")
    powers = torch.arange(0, spec.rotary_dim, 2, dtype=torch.float64, device="cpu") / spec.rotary_dim
    return positions.double().unsqueeze(1) / spec.theta**powers


def _layer(
    spec: LayerSpec, weights: Weights, prefix: str, hidden: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    def norm(place: str, norm_spec: NormSpec | None, x: torch.Tensor) -> torch.Tensor:
        return x if norm_spec is None else _norm(norm_spec, weights, f"{prefix}.{place}", x)

    if not isinstance(spec.mixer, AttentionSpec):
        raise ValueError("the oracle computes attention, no other mixers")
    times = spec.residual_multiplier
    normed = norm("mixer_norm_before", spec.mixer_norm_before, hidden)
    mixed = _attention(spec.mixer, weights, f"{prefix}.attention", normed, positions)
    mixed = norm("mixer_norm_after", spec.mixer_norm_after, mixed)
    # In a parallel layer the feed-forward part sees what attention saw, unless it has a norm of its own.
    parallel = spec.residual == "parallel"
    middle = hidden if parallel else hidden + times * mixed
    own = spec.ffn_norm_before is not None or not parallel
    seen = norm("ffn_norm_before", spec.ffn_norm_before, middle) if own else normed
    if isinstance(spec.ffn, MLPSpec):
        fed = _mlp(spec.ffn, weights, f"{prefix}.mlp", seen)
    else:
        fed = _moe(spec.ffn, weights, f"{prefix}.moe", seen)
    fed = norm("ffn_norm_after", spec.ffn_norm_after, fed)
    return hidden + times * (mixed + fed) if parallel else middle + times * fed


def _attention(
    spec: AttentionSpec, weights: Weights, prefix: str, x: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    count = x.shape[0]
    q = _linear(weights, f"{prefix}.q", x)
    k = _linear(weights, f"{prefix}.k", x)
    v = _linear(weights, f"{prefix}.v", x).view(count, spec.num_kv_heads, spec.v_head_dim)
    if spec.qk_norm is not None and spec.qk_norm.over == "all":
        q = _norm(spec.qk_norm.norm, weights, f"{prefix}.q_norm", q)
        k = _norm(spec.qk_norm.norm, weights, f"{prefix}.k_norm", k)
    q, k = q.view(count, spec.num_heads, spec.head_dim), k.view(count, spec.num_kv_heads, spec.head_dim)
    if spec.qk_norm is not None and spec.qk_norm.over != "all":
        q = _norm(spec.qk_norm.norm, weights, f"{prefix}.q_norm", q)
        k = _norm(spec.qk_norm.norm, weights, f"{prefix}.k_norm", k)
    if spec.rope is not None:
        q, k = _rotate(spec.rope, q, positions), _rotate(spec.rope, k, positions)
    of_head = torch.arange(spec.num_heads, device="cpu") // (spec.num_heads // spec.num_kv_heads)
    scores = torch.einsum("qhd,khd->hqk", q, k[:, of_head]) * spec.scale
    if spec.softcap is not None:
        scores = spec.softcap * torch.tanh(scores / spec.softcap)
    distance = positions.unsqueeze(1) - positions.unsqueeze(0)
    hidden = (distance < 0) | (distance >= (spec.window or count + 1))
    scores = scores.masked_fill(hidden, -math.inf)
    if spec.sinks:
        # A sink is one more logit of the softmax, and has no value.
        sink = weights[f"{prefix}.sinks"].view(-1, 1, 1).expand(-1, count, 1)
        shares = torch.cat((scores, sink), -1).softmax(-1)[..., :-1]
    else:
        shares = scores.softmax(-1)
    attended = torch.einsum("hqk,khd->qhd", shares, v[:, of_head])
    return _linear(weights, f"{prefix}.out", attended.reshape(count, -1))


def _rotate(spec: RopeSpec, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """x [L, heads, D]: its first ``rotary_dim`` elements turned, as pairs of halves or of neighbours."""
    angles = rope_angles(spec, positions).unsqueeze(1)
    cos, sin = angles.cos(), angles.sin()
    turned, rest = x[..., : spec.rotary_dim], x[..., spec.rotary_dim :]
    if spec.interleaved:
        a, b = turned[..., 0::2], turned[..., 1::2]
        turned = torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)
    else:
        a, b = turned.chunk(2, -1)
        turned = torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
    return torch.cat((turned, rest), -1)


def _mlp(spec: MLPSpec, weights: Weights, prefix: str, x: torch.Tensor) -> torch.Tensor:
    up = _linear(weights, f"{prefix}.up", x)
    inner = _activate(spec, _linear(weights, f"{prefix}.gate", x)) * up if spec.gated else _activate(spec, up)
    return _linear(weights, f"{prefix}.down", inner)


def _moe(spec: MoESpec, weights: Weights, prefix: str, x: torch.Tensor) -> torch.Tensor:
    logits = _linear(weights, f"{prefix}.router", x)
    scores = logits.softmax(-1) if spec.score == "softmax" else logits.sigmoid()
    total = torch.zeros_like(x)
    for token in range(x.shape[0]):
        chosen, experts = scores[token].topk(spec.top_k)
        if spec.renormalise:
            chosen = chosen / chosen.sum()
        for share, expert in zip(chosen * spec.scale, experts.tolist(), strict=True):
            row = x[token : token + 1]
            total[token] += share * _mlp(spec.expert, weights, f"{prefix}.experts.{expert}", row)[0]
    if spec.shared is not None:
        shared = _mlp(spec.shared, weights, f"{prefix}.shared", x)
        if spec.shared_gate:
            shared = shared * _linear(weights, f"{prefix}.shared_gate", x).sigmoid()
        total = total + shared
    return total


def _activate(spec: MLPSpec, x: torch.Tensor) -> torch.Tensor:
    if spec.activation == "silu":
        return x * x.sigmoid()
    if spec.activation == "gelu":
        return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))
    if spec.activation == "gelu_tanh":
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    positive = x.clamp(min=0)
    return positive if spec.activation == "relu" else positive**2


def _norm(spec: NormSpec, weights: Weights, name: str, x: torch.Tensor) -> torch.Tensor:
    weight = weights[f"{name}.weight"]
    if spec.kind == "layer":
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + spec.eps).sqrt() * weight
        return scaled + weights[f"{name}.bias"] if spec.bias else scaled
    scaled = x / (x.square().mean(-1, keepdim=True) + spec.eps).sqrt()
    return scaled * (1 + weight if spec.kind == "rms1p" else weight)


def _linear(weights: Weights, name: str, x: torch.Tensor) -> torch.Tensor:
    out = x @ weights[f"{name}.weight"].t()
    bias = weights.get(f"{name}.bias")
    return out if bias is None else out + bias
