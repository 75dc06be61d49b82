"""Which parameters a DecoderSpec has: names, shapes, and which of them lie in one tensor."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, TypeAlias

from kvpage.api.model import (
    AttentionSpec,
    DecoderSpec,
    LayerSpec,
    MLPSpec,
    MoESpec,
    NormSpec,
)

ParameterKind: TypeAlias = Literal["linear", "table", "norm", "bias", "float32", "other"]


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter of a spec.

    Attributes:
        name: kvpage's name (see ``WeightMap``). shape: as kvpage sees it, [out, in] of a linear layer.
        kind: "linear" weights go through a linear kernel, "table" is looked up by row, "norm" scales a norm,
            "float32" keeps that dtype whatever the model's.
        block: parameters with one ``block`` lie one after another, by rows, in one tensor where the loader
            may merge (q, k, v; gate, up): one matrix product serves them all.
    """

    name: str
    shape: tuple[int, ...]
    kind: ParameterKind
    block: str


def parameters(spec: DecoderSpec) -> Iterator[Parameter]:
    """Every parameter of ``spec``, in the order a step uses them; a tied head has no weight of its own."""
    hidden, vocab = spec.hidden_size, spec.vocab_size
    yield _single("embed.weight", (vocab, hidden), "table")
    if spec.embedding.positions is not None:
        rows = spec.embedding.positions + spec.embedding.position_offset
        yield _single("positions.weight", (rows, hidden), "table")
    for index, layer in enumerate(spec.layers):
        yield from _layer(f"layers.{index}", layer, hidden)
    yield from _norm("final_norm", spec.final_norm, hidden)
    if not spec.head.tied:
        yield _single("head.weight", (vocab, hidden), "linear")
    if spec.head.bias:
        yield _single("head.bias", (vocab,), "bias")


def _layer(prefix: str, layer: LayerSpec, hidden: int) -> Iterator[Parameter]:
    yield from _norm(f"{prefix}.mixer_norm_before", layer.mixer_norm_before, hidden)
    if isinstance(layer.mixer, AttentionSpec):
        yield from _attention(f"{prefix}.attention", layer.mixer, hidden)
    else:
        for name, shape in layer.mixer.parameters(hidden).items():
            yield _single(f"{prefix}.mixer.{name}", shape, _mixer_kind(name, shape))
    yield from _norm(f"{prefix}.mixer_norm_after", layer.mixer_norm_after, hidden)
    yield from _norm(f"{prefix}.ffn_norm_before", layer.ffn_norm_before, hidden)
    if isinstance(layer.ffn, MoESpec):
        yield from _moe(f"{prefix}.moe", layer.ffn, hidden)
    else:
        yield from _mlp(f"{prefix}.mlp", layer.ffn, hidden)
    yield from _norm(f"{prefix}.ffn_norm_after", layer.ffn_norm_after, hidden)


def _mixer_kind(name: str, shape: tuple[int, ...]) -> ParameterKind:
    """A mixer's own parameters by their names: a matrix ``x.weight`` is a linear layer, which may come quantized."""
    if name.endswith(".weight"):
        return "linear" if len(shape) == 2 else "norm" if name.endswith("norm.weight") else "other"
    return "bias" if name.endswith(".bias") else "other"


def _attention(prefix: str, spec: AttentionSpec, hidden: int) -> Iterator[Parameter]:
    outputs = {
        "q": spec.num_heads * spec.head_dim,
        "k": spec.num_kv_heads * spec.head_dim,
        "v": spec.num_kv_heads * spec.v_head_dim,
    }
    yield from _linears(prefix, "qkv", outputs, hidden, spec.qkv_bias)
    if spec.qk_norm is not None:
        heads_of = {"q": spec.num_heads, "k": spec.num_kv_heads}
        for part, heads in heads_of.items():
            shapes = {
                "head": (spec.head_dim,),
                "each_head": (heads, spec.head_dim),
                "all": (heads * spec.head_dim,),
            }
            yield from _norm(f"{prefix}.{part}_norm", spec.qk_norm.norm, *shapes[spec.qk_norm.over])
    if spec.sinks:
        yield _single(f"{prefix}.sinks", (spec.num_heads,), "other")
    yield from _linears(prefix, "out", {"out": hidden}, spec.num_heads * spec.v_head_dim, spec.out_bias)


def _mlp(prefix: str, spec: MLPSpec, hidden: int) -> Iterator[Parameter]:
    inner = spec.intermediate_size
    outputs = {"gate": inner, "up": inner} if spec.gated else {"up": inner}
    yield from _linears(prefix, "gate_up", outputs, hidden, spec.bias)
    yield from _linears(prefix, "down", {"down": hidden}, inner, spec.bias)


def _moe(prefix: str, spec: MoESpec, hidden: int) -> Iterator[Parameter]:
    yield _single(f"{prefix}.router.weight", (spec.num_experts, hidden), "linear")
    if spec.correction:
        yield _single(f"{prefix}.router.correction", (spec.num_experts,), "float32")
    for expert in range(spec.num_experts):
        yield from _mlp(f"{prefix}.experts.{expert}", spec.expert, hidden)
    if spec.shared is not None:
        yield from _mlp(f"{prefix}.shared", spec.shared, hidden)
        if spec.shared_gate:
            yield _single(f"{prefix}.shared_gate.weight", (1, hidden), "linear")


def _linears(
    prefix: str, block: str, outputs: dict[str, int], inputs: int, bias: bool
) -> Iterator[Parameter]:
    for part, size in outputs.items():
        yield Parameter(f"{prefix}.{part}.weight", (size, inputs), "linear", f"{prefix}.{block}.weight")
    if bias:
        for part, size in outputs.items():
            yield Parameter(f"{prefix}.{part}.bias", (size,), "bias", f"{prefix}.{block}.bias")


def _norm(prefix: str, norm: NormSpec | None, *shape: int) -> Iterator[Parameter]:
    if norm is not None:
        yield _single(f"{prefix}.weight", shape, "norm")
        if norm.bias:
            yield _single(f"{prefix}.bias", shape, "bias")


def _single(name: str, shape: tuple[int, ...], kind: ParameterKind) -> Parameter:
    return Parameter(name, shape, kind, name)
