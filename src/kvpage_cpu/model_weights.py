"""The parameters of a model as the native library reads them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import torch

from kvpage.api.model import AttentionSpec, DecoderEnv, DecoderSpec, LayerSpec, MLPSpec, NormSpec
from kvpage.api.quant import Dense, WeightForm
from kvpage_cpu.native import Context
from kvpage_cpu.packing import PLAIN, PackedLinear, merge, pack, why_not
from kvpage_cpu.structs import (
    LAYER,
    NORM_ALL,
    NORM_EACH_HEAD,
    NORM_HEAD,
    RMS,
    KvpLayer,
    KvpModel,
    KvpNorm,
)

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "relu2")
QK_NORMS = {"head": NORM_HEAD, "each_head": NORM_EACH_HEAD, "all": NORM_ALL}
QKV = ("attention.q", "attention.k", "attention.v")


def unfit_weights(spec: DecoderSpec, weights: Mapping[str, WeightForm]) -> list[str]:
    """Why the native kernels cannot compute these weights; empty if they can."""
    reasons: dict[str, None] = {}
    for index, layer in enumerate(spec.layers):
        for names in _products(layer):
            forms = [weights[f"layers.{index}.{name}.weight"] for name in names]
            reasons.update(dict.fromkeys(reason for form in forms for reason in why_not(form)))
            if not _alike(forms):
                reasons[f"{', '.join(names)} in different forms"] = None
    for name in ("embed.weight", "head.weight", "positions.weight"):
        if name in weights:
            reasons.update(dict.fromkeys(why_not(weights[name])))
    if "positions.weight" in weights and not isinstance(weights["positions.weight"], Dense):
        reasons["quantized positions"] = None
    return list(reasons)


def _products(layer: LayerSpec) -> list[tuple[str, ...]]:
    """The names of what one product computes, below ``layers.i.``."""
    gated = cast(MLPSpec, layer.ffn).gated
    return [QKV, ("attention.out",), ("mlp.gate", "mlp.up") if gated else ("mlp.up",), ("mlp.down",)]


def _alike(forms: Sequence[WeightForm]) -> bool:
    """Whether ``merge`` would take them, found out on a row of each."""
    first = torch.zeros(1, dtype=torch.int64, device="cpu")
    return len(forms) == 1 or merge([form.take(first) for form in forms]) is not None


class ModelWeights:
    """``struct``: the whole model for ``kvp_step``; ``layers``: its layers, of which rotary parts are set later.

    Args:
        weights: fit (``unfit_weights`` has no reasons). They are written over where ``env.weights_owned``.
    """

    def __init__(
        self, context: Context, spec: DecoderSpec, weights: Mapping[str, WeightForm], env: DecoderEnv
    ) -> None:
        self._context, self._weights = context, weights
        self._in_place = env.weights_owned
        self._tensors: list[torch.Tensor] = []
        self.layers = (KvpLayer * len(spec.layers))()
        self.struct = KvpModel(
            num_layers=len(spec.layers),
            hidden=spec.hidden_size,
            vocab=spec.vocab_size,
            layers=self.layers,
            head_scale=spec.head.scale,
            head_softcap=spec.head.softcap or 0.0,
        )
        for index, layer in enumerate(spec.layers):
            self._layer(self.layers[index], layer, f"layers.{index}")
        self.struct.final_norm = self._norm(spec.final_norm, "final_norm")
        self._ends(spec, getattr(torch, env.dtype))
        del self._weights

    def _ends(self, spec: DecoderSpec, dtype: torch.dtype) -> None:
        """Embedding and head. One memory serves both where they are tied: the head's panels, read by row."""
        model = self.struct
        embed = self._weights["embed.weight"]
        tied = "head.weight" not in self._weights
        head_name = "embed.weight" if tied else "head.weight"
        bias = self._vector("head.bias") if spec.head.bias else None
        model.embed_scale = float(torch.tensor(spec.embedding.scale, dtype=dtype, device="cpu"))
        if not tied and isinstance(embed, Dense):
            table = embed.tensor.contiguous()
            model.table, model.table_type = self._keep(table), PLAIN[table.dtype]
        head = self._pack([self._weights[head_name]], bias)
        model.head = head.struct
        if tied:
            model.packed_table = head.struct
        elif not isinstance(embed, Dense):
            model.packed_table = self._pack([embed], None).struct
        if spec.embedding.positions is not None:
            positions = self._weights["positions.weight"]
            assert isinstance(positions, Dense), "unfit_weights has no reasons"
            learned = positions.tensor.contiguous()
            model.positions, model.positions_type = self._keep(learned), PLAIN[learned.dtype]
            model.position_offset = spec.embedding.position_offset

    def _layer(self, struct: KvpLayer, layer: LayerSpec, prefix: str) -> None:
        mixer, ffn = layer.mixer, layer.ffn
        assert isinstance(mixer, AttentionSpec) and isinstance(ffn, MLPSpec), "the backend refused others"
        for place in ("mixer_norm_before", "mixer_norm_after", "ffn_norm_before", "ffn_norm_after"):
            norm = self._norm(getattr(layer, place), f"{prefix}.{place}")
            setattr(struct, place.replace("_norm", ""), norm)
        for name in ("heads", "kv_heads"):
            setattr(struct, name, getattr(mixer, f"num_{name}"))
        struct.head_dim, struct.v_head_dim = mixer.head_dim, mixer.v_head_dim
        struct.scale, struct.softcap, struct.window = mixer.scale, mixer.softcap or 0.0, mixer.window or 0
        struct.kv_group = mixer.kv_group
        if mixer.qk_norm is not None:
            struct.qk_norm = QK_NORMS[mixer.qk_norm.over]
            struct.q_norm = self._norm(mixer.qk_norm.norm, f"{prefix}.attention.q_norm")
            struct.k_norm = self._norm(mixer.qk_norm.norm, f"{prefix}.attention.k_norm")
        if mixer.sinks:
            struct.sinks = self._keep(self._vector(f"{prefix}.attention.sinks"))
        struct.activation, struct.gated = ACTIVATIONS.index(ffn.activation), ffn.gated
        struct.parallel = layer.residual == "parallel"
        struct.multiplier = layer.residual_multiplier
        biases = (mixer.qkv_bias, mixer.out_bias, ffn.bias, ffn.bias)
        for field, names, biased in zip(("qkv", "out", "up", "down"), _products(layer), biases, strict=True):
            setattr(struct, field, self._product([f"{prefix}.{name}" for name in names], biased))

    def _product(self, names: Sequence[str], biased: bool) -> object:
        bias = torch.cat([self._vector(f"{name}.bias") for name in names]) if biased else None
        return self._pack([self._weights[f"{name}.weight"] for name in names], bias).struct

    def _pack(self, forms: Sequence[WeightForm], bias: torch.Tensor | None) -> PackedLinear:
        form = merge(forms)
        assert form is not None, "unfit_weights has no reasons"
        packed = pack(self._context, form, bias, in_place=self._in_place)
        self._tensors += packed.tensors
        return packed

    def _norm(self, spec: NormSpec | None, name: str) -> KvpNorm:
        if spec is None:
            return KvpNorm()
        weight = self._vector(f"{name}.weight")
        if spec.kind == "rms1p":
            weight = weight + 1.0
        struct = KvpNorm(kind=LAYER if spec.kind == "layer" else RMS, eps=spec.eps, weight=self._keep(weight))
        if spec.bias:
            struct.bias = self._keep(self._vector(f"{name}.bias"))
        return struct

    def _vector(self, name: str) -> torch.Tensor:
        """A small parameter in float32."""
        form = self._weights[name]
        return (form.tensor if isinstance(form, Dense) else form.dequantize()).float().contiguous()

    def _keep(self, tensor: torch.Tensor) -> int:
        self._tensors.append(tensor)
        return tensor.data_ptr()
