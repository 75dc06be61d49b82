"""The parameters of a model as the native library reads them."""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Mapping, Sequence

import torch

from kvpage.api.model import (
    AttentionSpec,
    DecoderEnv,
    DecoderSpec,
    LayerSpec,
    MLPSpec,
    MoESpec,
    NormSpec,
)
from kvpage.api.quant import Dense, WeightForm
from kvpage_cpu.native import Context
from kvpage_cpu.packing import PLAIN, merge, pack, why_not
from kvpage_cpu.structs import (
    LAYER,
    NORM_ALL,
    NORM_EACH_HEAD,
    NORM_HEAD,
    RMS,
    KvpLayer,
    KvpLinear,
    KvpMixture,
    KvpMlp,
    KvpModel,
    KvpNorm,
)

LOG = logging.getLogger("kvpage")
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "relu2")
QK_NORMS = {"head": NORM_HEAD, "each_head": NORM_EACH_HEAD, "all": NORM_ALL}
QKV = ("attention.q", "attention.k", "attention.v")


def _inner_names(spec: MLPSpec, prefix: str) -> list[str]:
    return [f"{prefix}.gate", f"{prefix}.up"] if spec.gated else [f"{prefix}.up"]


def _alike(forms: Sequence[WeightForm]) -> bool:
    """Whether ``merge`` would take them, found out on a row of each."""
    first = torch.zeros(1, dtype=torch.int64, device="cpu")
    return merge([form.take(first) for form in forms]) is not None


class ModelWeights:
    """``struct``: the whole model for ``kvp_step``; ``layers``: its layers, of which rotary parts are set later.

    Weights without a native kernel are held as plain numbers of ``env.dtype``, which the log says.

    Args:
        weights: written over where ``env.weights_owned``.
    """

    def __init__(
        self, context: Context, spec: DecoderSpec, weights: Mapping[str, WeightForm], env: DecoderEnv
    ) -> None:
        self._context, self._weights = context, weights
        self._in_place = env.weights_owned
        self._dtype: torch.dtype = getattr(torch, env.dtype)
        self._unpacked: dict[str, int] = {}  # reason -> bytes
        self._tensors: list[torch.Tensor] = []
        self._structs: list[object] = []
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
        self._ends(spec)
        del self._weights
        for reason, size in self._unpacked.items():
            LOG.warning("%.1f MB of weights are plain %s natively: %s", size / 1e6, env.dtype, reason)

    def _ends(self, spec: DecoderSpec) -> None:
        """Embedding and head. One memory serves both where they are tied: the head's panels, read by row."""
        model = self.struct
        embed = self._fit("embed.weight")
        tied = "head.weight" not in self._weights
        bias = self._vector("head.bias") if spec.head.bias else None
        model.embed_scale = float(torch.tensor(spec.embedding.scale, dtype=self._dtype, device="cpu"))
        if not tied and isinstance(embed, Dense):
            table = embed.tensor.contiguous()
            model.table, model.table_type = self._keep(table), PLAIN[table.dtype]
        model.head = self._pack([embed if tied else self._fit("head.weight")], bias)
        if tied:
            model.packed_table = model.head
        elif not isinstance(embed, Dense):
            model.packed_table = self._pack([embed], None)
        if spec.embedding.positions is not None:
            positions = self._fit("positions.weight")
            plain = positions if isinstance(positions, Dense) else Dense(positions.dequantize())
            learned = plain.tensor.contiguous()
            model.positions, model.positions_type = self._keep(learned), PLAIN[learned.dtype]
            model.position_offset = spec.embedding.position_offset

    def _layer(self, struct: KvpLayer, layer: LayerSpec, prefix: str) -> None:
        mixer, ffn = layer.mixer, layer.ffn
        assert isinstance(mixer, AttentionSpec), "the backend refused others"
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
        struct.parallel = layer.residual == "parallel"
        struct.multiplier = layer.residual_multiplier
        qkv = self._products([f"{prefix}.{name}" for name in QKV], mixer.qkv_bias)
        struct.qkv, struct.num_qkv = (KvpLinear * 3)(*qkv), len(qkv)
        (struct.out,) = self._products([f"{prefix}.attention.out"], mixer.out_bias)
        if isinstance(ffn, MLPSpec):
            struct.mlp = self._mlp(ffn, f"{prefix}.mlp")
        else:
            mixture = self._mixture(ffn, f"{prefix}.moe")
            self._structs.append(mixture)
            struct.mixture = ctypes.pointer(mixture)

    def _mlp(self, spec: MLPSpec, prefix: str) -> KvpMlp:
        up = self._products(_inner_names(spec, prefix), spec.bias)
        (down,) = self._products([f"{prefix}.down"], spec.bias)
        return KvpMlp(
            up=(KvpLinear * 2)(*up),
            num_up=len(up),
            down=down,
            activation=ACTIVATIONS.index(spec.activation),
            gated=spec.gated,
        )

    def _mixture(self, spec: MoESpec, prefix: str) -> KvpMixture:
        experts = (KvpMlp * spec.num_experts)(
            *(self._mlp(spec.expert, f"{prefix}.experts.{index}") for index in range(spec.num_experts))
        )
        self._structs.append(experts)
        mixture = KvpMixture(
            num_experts=spec.num_experts,
            top_k=spec.top_k,
            sigmoid=spec.score == "sigmoid",
            renormalise=spec.renormalise,
            scale=spec.scale,
            experts=experts,
            router=self._router(spec, f"{prefix}.router.weight"),
        )
        if spec.groups is not None:
            mixture.groups, mixture.chosen_groups = spec.groups.count, spec.groups.chosen
            mixture.best_two = spec.groups.score == "best_two"
        if spec.correction:
            mixture.correction = self._keep(self._vector(f"{prefix}.router.correction"))
        if spec.shared is not None:
            mixture.has_shared, mixture.shared = True, self._mlp(spec.shared, f"{prefix}.shared")
            if spec.shared_gate:
                mixture.has_shared_gate = True
                (mixture.shared_gate,) = self._products([f"{prefix}.shared_gate"], False)
        return mixture

    def _router(self, spec: MoESpec, name: str) -> KvpLinear:
        form = self._fit(name)
        if spec.float32_router:
            form = Dense(form.dequantize())
        return self._pack([form], None)

    def _products(self, names: Sequence[str], biased: bool) -> list[KvpLinear]:
        """The outputs of all, one after another: of one layer where the forms agree, else of as few as can be."""
        runs: list[list[str]] = []
        forms = {name: self._fit(f"{name}.weight") for name in names}
        for name in names:
            if runs and _alike([forms[each] for each in (*runs[-1], name)]):
                runs[-1].append(name)
            else:
                runs.append([name])
        return [
            self._pack(
                [forms.pop(name) for name in run],
                torch.cat([self._vector(f"{name}.bias") for name in run]) if biased else None,
            )
            for run in runs
        ]

    def _fit(self, name: str) -> WeightForm:
        """The weight, as plain numbers where no native kernel computes its form."""
        form = self._weights[name]
        reasons = why_not(form)
        if not reasons:
            return form
        plain = Dense(form.dequantize().to(self._dtype))
        for reason in reasons:
            self._unpacked[reason] = self._unpacked.get(reason, 0) + plain.nbytes
        return plain

    def _pack(self, forms: Sequence[WeightForm], bias: torch.Tensor | None) -> KvpLinear:
        form = merge(forms)
        assert form is not None, "forms that are not alike come alone"
        exact = self._dtype == torch.float32
        packed = pack(self._context, form, bias, exact=exact, in_place=self._in_place)
        self._tensors += packed.tensors
        return packed.struct

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
