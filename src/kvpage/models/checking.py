"""Does a family's definition fit together: sizes, KV groups, kinds, and a place for every parameter. Pure; no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any, get_args, get_type_hints

from kvpage.api.kv import KVGroupSpec
from kvpage.api.model import (
    AttentionSpec,
    DecoderSpec,
    LayerSpec,
    MLPSpec,
    ModelDefinition,
    MoESpec,
    NormSpec,
    WeightRef,
)
from kvpage.api.parameters import parameters
from kvpage.errors import PluginError

OPTIONAL = frozenset({"head.weight"})
"""A tied model may name its head: some checkpoints hold one that differs from the embedding."""
SHOWN = 4


def check_definition(family: str, definition: ModelDefinition) -> None:
    """Find out at once what would fail later, or compute something else.

    Raises:
        PluginError: the definition contradicts itself; the message names the family and each fault.
    """
    try:
        faults = list(_faults(definition))
    except Exception as error:  # a plugin may put anything into a spec
        faults = [f"its spec cannot be read ({type(error).__name__}: {error})"]
    if faults:
        some = "; ".join(faults[:SHOWN]) + (
            "" if len(faults) <= SHOWN else f"; and {len(faults) - SHOWN} more"
        )
        raise PluginError(f"model family {family!r}: {some}: repair its plugin, or leave it out")


def _faults(definition: ModelDefinition) -> Iterator[str]:
    spec = definition.spec
    for name in ("vocab_size", "hidden_size", "max_position"):
        yield from _count(name, getattr(spec, name))
    if not spec.layers:
        yield "it has no layers"
    odd = next((layer for layer in spec.layers if not isinstance(layer, LayerSpec)), None)
    if odd is not None:
        yield f"a layer is {odd!r:.60}, no LayerSpec"
        return
    yield from _norm("final_norm", spec.final_norm)
    for index, layer in enumerate(spec.layers):
        yield from _layer(f"layers.{index}", layer)
    yield from _groups(spec)
    yield from _weights(spec, definition.weights)


def _layer(name: str, layer: LayerSpec) -> Iterator[str]:
    for place in ("mixer_norm_before", "mixer_norm_after", "ffn_norm_before", "ffn_norm_after"):
        norm = getattr(layer, place)
        if norm is not None:
            yield from _norm(f"{name}.{place}", norm)
    if layer.residual not in _choices(LayerSpec, "residual"):
        yield f"{name}.residual is {layer.residual!r:.40}, {_known(LayerSpec, 'residual')}"
    mixer = layer.mixer if isinstance(layer.mixer, AttentionSpec) else layer.mixer.attention
    yield from _attention(f"{name}.attention", mixer)
    if isinstance(layer.ffn, MoESpec):
        moe = layer.ffn
        yield from _mlp(f"{name}.moe.expert", moe.expert)
        if moe.shared is not None:
            yield from _mlp(f"{name}.moe.shared", moe.shared)
        if not 1 <= moe.top_k <= moe.num_experts:
            yield f"{name}.moe takes {moe.top_k} of {moe.num_experts} experts"
    elif isinstance(layer.ffn, MLPSpec):
        yield from _mlp(f"{name}.mlp", layer.ffn)
    else:
        yield f"{name}.ffn is {layer.ffn!r:.60}, neither MLPSpec nor MoESpec"


def _attention(name: str, mixer: AttentionSpec) -> Iterator[str]:
    for size in ("num_heads", "num_kv_heads", "head_dim", "v_head_dim"):
        yield from _count(f"{name}.{size}", getattr(mixer, size))
    if mixer.num_heads % mixer.num_kv_heads:
        yield f"{name}: {mixer.num_heads} query heads are no multiple of {mixer.num_kv_heads} KV heads"
    if mixer.window is not None:
        yield from _count(f"{name}.window", mixer.window)
    if mixer.rope is not None and not 1 <= mixer.rope.rotary_dim <= mixer.head_dim:
        yield f"{name}: rope turns {mixer.rope.rotary_dim} elements of a head of {mixer.head_dim}"


def _mlp(name: str, spec: MLPSpec) -> Iterator[str]:
    yield from _count(f"{name}.intermediate_size", spec.intermediate_size)
    if spec.activation not in _choices(MLPSpec, "activation"):
        yield f"{name}.activation is {spec.activation!r:.40}, {_known(MLPSpec, 'activation')}"


def _norm(name: str, spec: object) -> Iterator[str]:
    if not isinstance(spec, NormSpec):
        yield f"{name} is {spec!r:.60}, no NormSpec"
    elif spec.kind not in _choices(NormSpec, "kind"):
        yield f"{name}.kind is {spec.kind!r:.40}, {_known(NormSpec, 'kind')}"


def _groups(spec: DecoderSpec) -> Iterator[str]:
    """Each layer has one KV tensor, in a group of its own sizes, at the place that it names."""
    owners: dict[tuple[int, int], int] = {
        (number, place): layer
        for number, group in enumerate(spec.kv_groups)
        for place, layer in enumerate(group.layers)
    }
    for number, group in enumerate(spec.kv_groups):
        if group.kind not in ("full", "window"):
            yield f"kv_groups[{number}].kind is {group.kind!r:.40}; 'full' and 'window' are supported"
        if (group.kind == "window") != (group.window is not None):
            yield f"kv_groups[{number}] is of kind {group.kind!r:.40} with window={group.window!r:.40}"
    listed = sorted(owners.values())
    if listed != list(range(len(spec.layers))):
        yield (
            f"kv_groups list the layers {_some(listed)}; each of the {len(spec.layers)} layers must be in one group, once"
        )
    for index, mixer in enumerate(spec.attention):
        place = (mixer.kv_group, mixer.kv_index)
        if owners.get(place) != index:
            yield (
                f"layers.{index} has its KV at kv_group={mixer.kv_group}, kv_index={mixer.kv_index}, where kv_groups "
                f"have {'no layer' if place not in owners else f'layer {owners[place]}'}"
            )
        else:
            yield from _sizes(index, mixer, spec.kv_groups[mixer.kv_group])


def _sizes(index: int, mixer: AttentionSpec, group: KVGroupSpec) -> Iterator[str]:
    for name in ("num_kv_heads", "head_dim", "v_head_dim"):
        own, groups = getattr(mixer, name), getattr(group, name)
        if own != groups:
            yield f"layers.{index} has {name}={own}, its KV group {mixer.kv_group} {groups}"
    if group.window is not None and (mixer.window is None or mixer.window > group.window):
        seen = "all tokens" if mixer.window is None else f"{mixer.window} tokens"
        yield f"layers.{index} sees {seen}, its KV group {mixer.kv_group} keeps the last {group.window}"


def _weights(spec: DecoderSpec, weights: Mapping[str, Any]) -> Iterator[str]:
    if not isinstance(weights, Mapping):
        yield f"weights is {weights!r:.60}, no mapping"
        return
    names = {parameter.name for parameter in parameters(spec)}
    missing = [name for name in names if name not in weights]
    unknown = [name for name in weights if name not in names and name not in OPTIONAL]
    if missing:
        yield f"weights lack {_some(sorted(missing))}, which the spec has"
    if unknown:
        yield f"weights name {_some(sorted(map(str, unknown)))}, which the spec does not have"
    for name, ref in weights.items():
        if not isinstance(ref, WeightRef) or not isinstance(ref.name, str):
            yield f"weights have {ref!r:.60} for {name}, no WeightRef"
            return


def _count(name: str, value: object) -> Iterator[str]:
    if type(value) is not int or value < 1:
        yield f"{name} is {value!r:.40}, no whole number above 0"


@cache
def _choices(kind: object, field: str) -> tuple[str, ...]:
    return get_args(get_type_hints(kind)[field])


def _known(kind: object, field: str) -> str:
    return f"known are {', '.join(_choices(kind, field))}"


def _some(values: list[Any]) -> str:
    shown = ", ".join(str(value) for value in values[:SHOWN])
    return shown + (f" ... ({len(values)} in all)" if len(values) > SHOWN else "")
