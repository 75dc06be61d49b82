"""A definition that contradicts itself is refused with each fault; those of every family pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from kvpage.api.model import AttentionSpec, LayerSpec, ModelDefinition, WeightRef
from kvpage.errors import PluginError
from kvpage.models.checking import check_definition
from kvpage.models.families import llama
from kvpage.models.hf_config import HFConfig

CONFIG = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "vocab_size": 100, "rope_theta": 10000.0,
}  # fmt: skip


def llama_definition() -> ModelDefinition:
    return llama.translate(HFConfig(CONFIG, source="config.json"), max_model_len=None)


def of_spec(**changes: Any) -> Callable[[ModelDefinition], ModelDefinition]:
    return lambda whole: replace(whole, spec=replace(whole.spec, **changes))


def of_layers(change: Callable[[LayerSpec], LayerSpec]) -> Callable[[ModelDefinition], ModelDefinition]:
    return lambda whole: replace(
        whole, spec=replace(whole.spec, layers=tuple(change(layer) for layer in whole.spec.layers))
    )


def of_mixers(**changes: Any) -> Callable[[ModelDefinition], ModelDefinition]:
    def change(layer: LayerSpec) -> LayerSpec:
        assert isinstance(layer.mixer, AttentionSpec)
        return replace(layer, mixer=replace(layer.mixer, **changes))

    return of_layers(change)


def of_group(**changes: Any) -> Callable[[ModelDefinition], ModelDefinition]:
    return lambda whole: of_spec(kv_groups=(replace(whole.spec.kv_groups[0], **changes),))(whole)


def of_weights(change: Callable[[dict[str, Any]], object]) -> Callable[[ModelDefinition], ModelDefinition]:
    def changed(whole: ModelDefinition) -> ModelDefinition:
        weights: dict[str, Any] = dict(whole.weights)
        change(weights)
        return replace(whole, weights=weights)

    return changed


FAULTS: dict[str, tuple[Callable[[ModelDefinition], ModelDefinition], str]] = {
    "no layers": (of_spec(layers=(), kv_groups=()), "it has no layers"),
    "a layer of no kind": (of_spec(layers=(3,)), "a layer is 3, no LayerSpec"),
    "no vocabulary": (of_spec(vocab_size=0), "vocab_size is 0, no whole number above 0"),
    "a fractional size": (of_spec(hidden_size=32.0), "hidden_size is 32.0"),
    "heads that do not divide": (of_mixers(num_kv_heads=3), "4 query heads are no multiple of 3 KV heads"),
    "one place for all": (of_mixers(kv_index=0), "layers.1 has its KV at kv_group=0, kv_index=0, where kv_groups have layer 0"),
    "no such group": (of_mixers(kv_group=7), "layers.0 has its KV at kv_group=7, kv_index=0, where kv_groups have no layer"),
    "a layer in no group": (of_group(layers=(0, 1)), "each of the 3 layers must be in one group, once"),
    "a group of other heads": (of_group(num_kv_heads=4), "layers.0 has num_kv_heads=2, its KV group 0 4"),
    "a group of other values": (of_group(v_head_dim=16), "layers.0 has v_head_dim=8, its KV group 0 16"),
    "a window that layers see past": (of_group(kind="window", window=8), "layers.0 sees all tokens, its KV group 0 keeps the last 8"),
    "a window of no kind": (of_group(window=8), "kv_groups[0] is of kind 'full' with window=8"),
    "a kind to come": (of_group(kind="latent"), "kv_groups[0].kind is 'latent'"),
    "an unknown activation": (of_layers(lambda layer: replace(layer, ffn=replace(layer.ffn, activation="zorg"))), "layers.0.mlp.activation is 'zorg', known are silu"),
    "an unknown norm": (of_layers(lambda layer: replace(layer, mixer_norm_before=replace(layer.mixer_norm_before, kind="l2"))), "mixer_norm_before.kind is 'l2'"),
    "a weight too few": (of_weights(lambda w: w.pop("final_norm.weight")), "weights lack final_norm.weight, which the spec has"),
    "a weight too many": (of_weights(lambda w: w.update(made_up=WeightRef(name="x"))), "weights name made_up, which the spec does not have"),
    "a place of no kind": (of_weights(lambda w: w.update({"embed.weight": "x"})), "weights have 'x' for embed.weight, no WeightRef"),
    "an unreadable spec": (of_spec(layers=None), "its spec cannot be read (TypeError"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_named_with_the_family(fault: str) -> None:
    change, reason = FAULTS[fault]
    with pytest.raises(PluginError) as raised:
        check_definition("zorg", change(llama_definition()))
    assert str(raised.value).startswith("model family 'zorg': ")
    assert reason in str(raised.value)


def test_a_whole_definition_passes() -> None:
    check_definition("llama", llama_definition())
