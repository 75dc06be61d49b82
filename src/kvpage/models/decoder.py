"""The one torch decoder: it interprets a DecoderSpec, for every family."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from kvpage.api.decoder import DecoderBackend
from kvpage.api.model import (
    AttentionSpec,
    DecoderEnv,
    DecoderSpec,
    LayerSpec,
    Mixer,
    MLPSpec,
    NormSpec,
    StepContext,
)
from kvpage.api.quant import WeightForm
from kvpage.nn.attention import Attention
from kvpage.nn.embedding import Embedding
from kvpage.nn.linear import dense, make_kernel
from kvpage.nn.mlp import MLP
from kvpage.nn.moe import MoE
from kvpage.nn.norm import Norm, build_norm


class TorchDecoder(DecoderBackend):
    """The decoder backend that takes every spec, with any attention backend."""

    def build(self, spec: DecoderSpec, weights: Mapping[str, WeightForm], env: DecoderEnv) -> Decoder:
        return Decoder(spec, weights, env)


class Decoder:
    """A ``CausalLM`` of plain torch operations; call it under ``torch.inference_mode``.

    ``weights`` has every parameter that ``kvpage.api.parameters`` names for ``spec``; they are kept, not copied.
    """

    __slots__ = ("_embed", "_final_norm", "_head", "_layers", "_scale", "_softcap", "spec")

    def __init__(self, spec: DecoderSpec, weights: Mapping[str, WeightForm], env: DecoderEnv) -> None:
        self.spec = spec
        self._embed = Embedding(spec.embedding, weights, getattr(torch, env.dtype))
        self._layers = [Layer(layer, weights, f"layers.{i}", env) for i, layer in enumerate(spec.layers)]
        self._final_norm = build_norm(spec.final_norm, weights, "final_norm")
        # A tied head has a weight of its own only where the checkpoint's differs from the embedding.
        head = weights["head.weight" if "head.weight" in weights else "embed.weight"]
        self._head = make_kernel(head, dense(weights["head.bias"]) if spec.head.bias else None, env, "head")
        self._scale, self._softcap = spec.head.scale, spec.head.softcap

    def forward(self, token_ids: torch.Tensor, positions: torch.Tensor, ctx: StepContext) -> torch.Tensor:
        """int64 [T], int64 [T] -> hidden states after the final norm [T, H]."""
        hidden = self._embed(token_ids, positions)
        for layer in self._layers:
            layer(hidden, positions, ctx)
        return self._final_norm(hidden)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[N, H] -> [N, V], of the model's dtype; a new tensor."""
        logits = self._head.forward(hidden)
        if self._scale != 1.0:
            logits = logits.mul_(self._scale)
        if self._softcap is not None:
            logits = logits.div_(self._softcap).tanh_().mul_(self._softcap)
        return logits


class Layer:
    """One decoder layer; adds to the residual stream in place."""

    __slots__ = (
        "_ffn",
        "_ffn_after",
        "_ffn_before",
        "_mixer",
        "_mixer_after",
        "_mixer_before",
        "_multiplier",
        "_parallel",
    )

    def __init__(
        self, spec: LayerSpec, weights: Mapping[str, WeightForm], prefix: str, env: DecoderEnv
    ) -> None:
        def norm(place: str, norm_spec: NormSpec | None) -> Norm | None:
            return None if norm_spec is None else build_norm(norm_spec, weights, f"{prefix}.{place}")

        self._mixer_before = norm("mixer_norm_before", spec.mixer_norm_before)
        self._mixer_after = norm("mixer_norm_after", spec.mixer_norm_after)
        self._ffn_before = norm("ffn_norm_before", spec.ffn_norm_before)
        self._ffn_after = norm("ffn_norm_after", spec.ffn_norm_after)
        self._mixer = _build_mixer(spec, weights, prefix, env)
        self._ffn = (
            MLP(spec.ffn, weights, f"{prefix}.mlp", env)
            if isinstance(spec.ffn, MLPSpec)
            else MoE(spec.ffn, weights, f"{prefix}.moe", env)
        )
        self._parallel = spec.residual == "parallel"
        self._multiplier = spec.residual_multiplier

    def __call__(self, hidden: torch.Tensor, positions: torch.Tensor, ctx: StepContext) -> None:
        """hidden [T, H] is changed in place."""
        normed = _apply(self._mixer_before, hidden)
        mixed = _apply(self._mixer_after, self._mixer(normed, positions, ctx))
        if self._parallel:
            if self._ffn_before is not None:
                normed = self._ffn_before(hidden)
            mixed.add_(_apply(self._ffn_after, self._ffn(normed)))
            self._join(hidden, mixed)
            return
        self._join(hidden, mixed)
        normed = _apply(self._ffn_before, hidden)
        self._join(hidden, _apply(self._ffn_after, self._ffn(normed)))

    def _join(self, hidden: torch.Tensor, branch: torch.Tensor) -> None:
        if self._multiplier != 1.0:
            branch.mul_(self._multiplier)
        hidden.add_(branch)


def _build_mixer(spec: LayerSpec, weights: Mapping[str, WeightForm], prefix: str, env: DecoderEnv) -> Mixer:
    if isinstance(spec.mixer, AttentionSpec):
        return Attention(spec.mixer, weights, f"{prefix}.attention", env)
    start = f"{prefix}.mixer."
    own = {name.removeprefix(start): form for name, form in weights.items() if name.startswith(start)}
    return spec.mixer.build(own, env)


def _apply(norm: Norm | None, x: torch.Tensor) -> torch.Tensor:
    return x if norm is None else norm(x)
