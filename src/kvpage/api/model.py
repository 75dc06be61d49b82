"""A model as data: DecoderSpec and its parts; and what the runner calls: CausalLM.

A family translates a checkpoint's config into a DecoderSpec; one torch ``Decoder`` interprets every spec.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias, TypeVar, overload

from kvpage.api.kv import KVGroupSpec

if TYPE_CHECKING:
    import torch

    from kvpage.api.decoder import KVGroupStep
    from kvpage.api.quant import LinearChoice, LinearKernel, WeightForm


T = TypeVar("T")
D = TypeVar("D")


@dataclass(frozen=True, kw_only=True, slots=True)
class NormSpec:
    """What x is divided and scaled by.

    ``kind``: "rms" (arXiv:1910.07467), "rms32" (the same, rounded to the model's dtype after the weight instead of
    before, OLMo-2), "rms1p" (scales by 1 + weight, rounded likewise, Gemma), "layer" (with ``bias`` or not).
    """

    kind: Literal["rms", "rms32", "rms1p", "layer"]
    eps: float
    bias: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class RopeSpec:
    """Rotary position embedding whose frequencies are known at load; "longrope" has two sets of them.

    Attributes:
        kind: transformers' rope_type: "default", "linear", "dynamic", "yarn", "longrope", "llama3".
        theta: base. rotary_dim: elements of a head that turn; of an odd number, one more does.
        interleaved: pairs (2i, 2i+1) instead of (i, i + rotary_dim/2).
        max_position: positions the frequencies are computed for (``max_model_len``; dynamic).
        parameters: the other values of ``rope_parameters`` as the checkpoint states them.
    """

    kind: str
    theta: float
    rotary_dim: int
    interleaved: bool = False
    max_position: int = 0
    parameters: Mapping[str, Any] = field(default_factory=dict)

    @property
    def switch(self) -> int | None:
        """Tokens of a sequence beyond which all its positions turn by the long factors; ``None`` = they never do."""
        return int(self.parameters["original_max_position_embeddings"]) if self.kind == "longrope" else None


@dataclass(frozen=True, kw_only=True, slots=True)
class QKNormSpec:
    """Norm of q and k before rope.

    ``over``: each head's elements, with one weight for all heads ("head", Qwen3) or one a head ("each_head", Cohere;
    layer norms without bias only); or the elements of all heads at once ("all", OLMo-2).
    """

    norm: NormSpec
    over: Literal["head", "each_head", "all"] = "head"


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionSpec:
    """Softmax attention with paged KV. ``kv_group`` and ``kv_index`` say where its K and V live."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    v_head_dim: int
    scale: float
    kv_group: int
    kv_index: int
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: QKNormSpec | None = None
    rope: RopeSpec | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class MLPSpec:
    """down(act(gate(x)) * up(x)) where ``gated``, else down(act(up(x)))."""

    intermediate_size: int
    activation: Literal["silu", "gelu", "gelu_tanh", "relu", "relu2"]
    gated: bool = True
    bias: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertGroups:
    """Experts in ``count`` equal groups; a token takes experts of the ``chosen`` best groups only (DeepSeek).

    ``score`` of a group: its best expert's, or the sum of its two best.
    """

    count: int
    chosen: int
    score: Literal["best", "best_two"]


@dataclass(frozen=True, kw_only=True, slots=True)
class MoESpec:
    """A router sends each token to ``top_k`` of ``num_experts`` gated MLPs; ``shared`` runs for every token.

    ``score`` softmax or sigmoid over the router's logits; ``renormalise`` the chosen weights to sum 1;
    ``shared_gate``: the shared MLP's output is scaled by sigmoid of a linear gate (Qwen2-MoE);
    ``correction``: experts are chosen, but not weighted, by score plus a learned value each (DeepSeek-V3);
    ``float32_router``: the router's product is computed in float32 whatever the model's dtype.
    """

    expert: MLPSpec
    num_experts: int
    top_k: int
    score: Literal["softmax", "sigmoid"] = "softmax"
    renormalise: bool = True
    scale: float = 1.0
    shared: MLPSpec | None = None
    shared_gate: bool = False
    groups: ExpertGroups | None = None
    correction: bool = False
    float32_router: bool = False


class Mixer(Protocol):
    """What mixes tokens in one layer: x [T, H] (normed) -> [T, H]. ``positions`` int64 [T]."""

    def __call__(self, x: torch.Tensor, positions: torch.Tensor, ctx: StepContext) -> torch.Tensor: ...


class MixerSpec(Protocol):
    """Any other token mixer: a plugin's own spec type, which builds the torch code that runs it."""

    @property
    def attention(self) -> AttentionSpec:
        """The paged attention through which it mixes: what it hands to ``ctx.attend``, and where its K and V live."""
        ...

    def parameters(self, hidden_size: int) -> Mapping[str, tuple[int, ...]]:
        """Names (below ``layers.i.mixer.``) and shapes of its parameters.

        A matrix ``x.weight`` [out, in] is a linear layer and may come quantized: ``build`` makes it with a linear
        kernel of ``env``. ``x_norm.weight`` [n] scales a norm. All others are given as ``Dense``.
        """
        ...

    def build(self, weights: Mapping[str, WeightForm], env: DecoderEnv) -> Mixer:
        """The mixer of one layer; ``weights`` has the names of ``parameters``."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerSpec:
    """One decoder layer: mixer, feed-forward, the norms by place, and how they join the residual stream.

    sequential: x += m * after1(mixer(before1(x))); x += m * after2(ffn(before2(x))).
    parallel:   x += m * (after1(mixer(before1(x))) + after2(ffn(before2(x)))), before2 = before1 where it is None.
    """

    mixer: AttentionSpec | MixerSpec
    ffn: MLPSpec | MoESpec
    mixer_norm_before: NormSpec | None
    ffn_norm_before: NormSpec | None
    mixer_norm_after: NormSpec | None = None
    ffn_norm_after: NormSpec | None = None
    residual: Literal["sequential", "parallel"] = "sequential"
    residual_multiplier: float = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class EmbeddingSpec:
    """Token embedding, times ``scale``; plus a learned position table of ``positions`` rows where given."""

    scale: float = 1.0
    positions: int | None = None
    position_offset: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadSpec:
    """Output projection: ``tied`` to the embedding or not; logits times ``scale``, then soft-capped."""

    tied: bool
    bias: bool = False
    scale: float = 1.0
    softcap: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class DecoderSpec:
    """A decoder-only model as data; immutable, and enough to build and size it.

    ``max_position`` is the context that the checkpoint states; ``vocab_size`` the rows of the embedding.
    """

    family: str
    vocab_size: int
    hidden_size: int
    max_position: int
    embedding: EmbeddingSpec
    layers: tuple[LayerSpec, ...]
    final_norm: NormSpec
    head: HeadSpec
    kv_groups: tuple[KVGroupSpec, ...]

    @property
    def attention(self) -> tuple[AttentionSpec, ...]:
        """The paged attention of each layer, in order."""
        mixers = (layer.mixer for layer in self.layers)
        return tuple(mixer if isinstance(mixer, AttentionSpec) else mixer.attention for mixer in mixers)


class PagedModelSpec(Protocol):
    """What the engine itself knows of a model, however it is computed: enough to page its KV.

    A ``DecoderSpec`` is one; so is a model that runs through transformers' own code.
    """

    @property
    def family(self) -> str:
        """What it is called in the log."""
        ...

    @property
    def vocab_size(self) -> int:
        """Logits a position."""
        ...

    @property
    def hidden_size(self) -> int:
        """Elements of a hidden state."""
        ...

    @property
    def max_position(self) -> int:
        """Tokens of context."""
        ...

    @property
    def kv_groups(self) -> tuple[KVGroupSpec, ...]:
        """Which layers keep their KV together."""
        ...

    @property
    def attention(self) -> tuple[AttentionSpec, ...]:
        """The paged attention of each layer, in order."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightRef:
    """Where a parameter lies in a checkpoint: tensor ``name``.

    Attributes:
        rows: [start, stop) of the outputs where several parameters share one tensor (Phi-3's qkv).
        every: ``rows`` repeats: of every ``every`` outputs, those in ``rows`` (GPT-NeoX: q, k, v a head).
        transpose: stored [in, out] (GPT-2); ``rows`` then counts columns of the stored tensor.
        index: the parameter lies in this entry of a tensor that has one more dimension, its first: all experts
            of a layer in one tensor [experts, out, in]. The other fields then describe the entry.
        otherwise: where the parameter lies in a checkpoint that has no tensor ``name``. One model's checkpoints
            may have several layouts: experts have a tensor each on disk, and one for all in transformers' memory;
            GPT-NeoX's head has another name there.
    """

    name: str
    rows: tuple[int, int] | None = None
    every: int | None = None
    transpose: bool = False
    index: int | None = None
    otherwise: WeightRef | None = None


WeightMap: TypeAlias = Mapping[str, WeightRef]
"""kvpage's parameter name -> its place in the checkpoint. Names:

embed.weight, positions.weight, final_norm.{weight,bias}, head.{weight,bias}, and for each layer i
layers.i.{mixer_norm_before,mixer_norm_after,ffn_norm_before,ffn_norm_after}.{weight,bias},
layers.i.attention.{q,k,v,out}.{weight,bias}, layers.i.attention.{q_norm,k_norm}.{weight,bias},
layers.i.attention.sinks, layers.i.mlp.{gate,up,down}.{weight,bias},
layers.i.moe.router.{weight,correction}, layers.i.moe.experts.e.{gate,up,down}.weight, layers.i.moe.shared.{gate,up,down}.weight,
layers.i.moe.shared_gate.weight.
"""


class ModelConfig(Protocol):
    """A checkpoint's config.json as a family reads it: every read says what type it expects.

    Errors are ``kvpage.errors.CheckpointError`` and name the file, the key and the value found. A key that holds
    null counts as absent, except to ``in``.
    """

    @property
    def source(self) -> str:
        """The file it was read from."""
        ...

    def __contains__(self, key: str) -> bool: ...

    @overload
    def get(self, kind: type[T], key: str) -> T: ...

    @overload
    def get(self, kind: type[T], key: str, default: D) -> T | D: ...

    def get(self, kind: type[Any], key: str, default: Any = ...) -> Any:
        """The value of ``key`` as ``kind`` (int, float, bool, str, list, dict); without a default it must be there."""
        ...

    def count(self, key: str, default: int | None = None) -> int:
        """A whole number of at least 1 (a size)."""
        ...

    @property
    def num_layers(self) -> int:
        """``num_hidden_layers``."""
        ...

    def rope_parameters(self, layer_type: str | None = None) -> dict[str, Any]:
        """What it says about rope, at least rope_type and rope_theta, whichever generation wrote it."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelDefinition:
    """What a family makes of a checkpoint's config: the model as data, and where its parameters lie."""

    spec: DecoderSpec
    weights: WeightMap


@dataclass(frozen=True, kw_only=True, slots=True)
class DecoderEnv:
    """Where a decoder runs: torch device string and dtype name, and the linear kernels to try, in order, before
    the plain one. ``on_linear`` is told which of them was taken for each weight. ``weights_owned``: the memory of the
    weights is this model's alone, and a decoder backend may write over it (to pack them where they lie) as soon as
    it is sure to build the model."""

    device: str
    dtype: str
    linear_kernels: tuple[type[LinearKernel], ...] = ()
    on_linear: Callable[[LinearChoice], None] | None = field(default=None, compare=False, repr=False)
    weights_owned: bool = False


class StepContext(Protocol):
    """A step, as a model sees it: an explicit argument, never ambient state."""

    @property
    def wanted(self) -> torch.Tensor | None:
        """int32 [N] on the host: the tokens whose hidden states will be read, ascending, each the last of its row; a
        model may leave the other states undefined. ``None``: all will be read."""
        ...

    def attend(
        self,
        spec: AttentionSpec,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Rotate q [T, Hq, D] and k [T, Hkv, D], store k and v [T, Hkv, Dv], attend: [T, Hq, Dv]."""
        ...

    def group(self, index: int) -> KVGroupStep:
        """KV group ``index`` during this step, for a decoder backend that reaches the cache itself."""
        ...


class CausalLM(Protocol):
    """What the runner calls; the torch Decoder, or anything that keeps this contract."""

    def forward(self, token_ids: torch.Tensor, positions: torch.Tensor, ctx: StepContext) -> torch.Tensor:
        """int64 [T], int64 [T] -> hidden states after the final norm [T, H], of the model's dtype or float32."""
        ...

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[N, H], as ``forward`` gives them -> [N, V], of the model's dtype or float32."""
        ...
