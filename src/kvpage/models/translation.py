"""What the families share when they translate a config: rope, activations, KV groups, weight names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, TypeAlias

from kvpage.api.kv import KVGroupSpec
from kvpage.api.model import AttentionSpec, DecoderSpec, LayerSpec, RopeSpec, WeightMap, WeightRef
from kvpage.api.parameters import parameters
from kvpage.errors import CheckpointError
from kvpage.models.hf_config import HFConfig

Activation: TypeAlias = Literal["silu", "gelu", "gelu_tanh", "relu", "relu2"]

ACTIVATIONS: Mapping[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
}

ROPE_KEYS: Mapping[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "longrope": ("factor", "short_factor", "long_factor"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}
"""Rope kinds, and the values each must have (``factor`` of yarn and longrope has a default)."""

OLD_ROPE_NAMES: Mapping[str, str] = {"su": "longrope", "mrope": "default"}

HF_NAMES: Mapping[str, str] = {
    "embed": "model.embed_tokens",
    "final_norm": "model.norm",
    "head": "lm_head",
    "mixer_norm_before": "input_layernorm",
    "ffn_norm_before": "post_attention_layernorm",
    "attention.q": "self_attn.q_proj",
    "attention.k": "self_attn.k_proj",
    "attention.v": "self_attn.v_proj",
    "attention.out": "self_attn.o_proj",
    "attention.q_norm": "self_attn.q_norm",
    "attention.k_norm": "self_attn.k_norm",
    "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
}
"""The names most families use; a family passes its own table where it differs."""


def read_activation(cfg: HFConfig, key: str = "hidden_act", default: str = "silu") -> Activation:
    """The activation function of the MLP."""
    name = cfg.get(str, key, default)
    if name not in ACTIVATIONS:
        raise CheckpointError(
            f"{cfg.source}: key {key!r} is {name!r}; kvpage has {', '.join(sorted(ACTIVATIONS))}"
        )
    return ACTIVATIONS[name]


def read_plain_heads(cfg: HFConfig) -> tuple[int, int, int]:
    """(query heads, KV heads, elements a head) of a family whose heads all have a K and V of their own."""
    heads, hidden = cfg.count("num_attention_heads"), cfg.count("hidden_size")
    if hidden % heads:
        raise CheckpointError(
            f"{cfg.source}: hidden_size {hidden} is no multiple of num_attention_heads {heads}"
        )
    return heads, heads, hidden // heads


def require(cfg: HFConfig, key: str, value: bool) -> None:
    """Refuse a config whose ``key`` is not ``value``, the only one that the family runs (and its default)."""
    if cfg.get(bool, key, value) != value:
        raise CheckpointError(f"{cfg.source}: key {key!r} is {not value}; only {value} is supported")


def read_heads(
    cfg: HFConfig, *, kv_default: int | None = None, head_dim_default: int | None = None
) -> tuple[int, int, int]:
    """(query heads, KV heads, elements a head); the defaults are the family's where the config does not say."""
    heads = cfg.count("num_attention_heads")
    kv_heads = cfg.count("num_key_value_heads", kv_default or heads)
    if heads % kv_heads:
        raise CheckpointError(
            f"{cfg.source}: num_attention_heads {heads} is no multiple of num_key_value_heads {kv_heads}"
        )
    hidden = cfg.count("hidden_size")
    if head_dim_default is None and cfg.get(int, "head_dim", None) is None and hidden % heads:
        raise CheckpointError(
            f"{cfg.source}: hidden_size {hidden} is no multiple of num_attention_heads {heads}, and no head_dim is given"
        )
    return heads, kv_heads, cfg.count("head_dim", head_dim_default or max(hidden // heads, 1))


def read_rope(
    cfg: HFConfig,
    head_dim: int,
    *,
    max_model_len: int | None,
    layer_type: str | None = None,
    partial: bool = False,
    old_names: Mapping[str, str] = OLD_ROPE_NAMES,
    interleaved: bool = False,
) -> RopeSpec:
    """Rope of a model; those of "dynamic" are fixed for ``max_model_len`` (or the stated context).

    Args:
        partial: the family turns ``partial_rotary_factor`` of each head; without, another than 1 is refused.
        old_names: rope types that mean another one in this family's configs.
        interleaved: the family turns neighbouring elements as a pair.
    """
    values = cfg.rope_parameters(layer_type)
    kind = old_names.get(values["rope_type"], values["rope_type"])
    if kind not in ROPE_KEYS:
        raise CheckpointError(
            f"{cfg.source}: rope_type {kind!r} is unknown; kvpage has {', '.join(ROPE_KEYS)}"
        )
    rotary_dim = _rotary_dim(cfg, values, head_dim, partial)
    if (kind in ("yarn", "longrope") and rotary_dim % 2) or (kind == "dynamic" and rotary_dim <= 2):
        raise CheckpointError(
            f"{cfg.source}: rope_type {kind!r} is not defined for {rotary_dim} turned elements of a head; "
            "an even number above 2 is supported"
        )
    context = cfg.count("max_position_embeddings")
    trained = _positive(cfg, int, values, "original_max_position_embeddings", context)
    values["original_max_position_embeddings"] = trained
    if kind in ("yarn", "longrope"):
        values.setdefault("factor", context / trained)
    used = _checked_rope_values(cfg, kind, values, rotary_dim)
    if kind == "dynamic":
        used["max_position_embeddings"] = context
    return RopeSpec(
        kind=kind,
        theta=_positive(cfg, float, values, "rope_theta"),
        rotary_dim=rotary_dim,
        interleaved=interleaved,
        max_position=(max_model_len or context) if kind == "dynamic" else 0,
        parameters=used,
    )


def _rotary_dim(cfg: HFConfig, values: Mapping[str, Any], head_dim: int, partial: bool) -> int:
    """Elements of a head that turn, as transformers counts them."""
    factor = _positive(cfg, float, values, "partial_rotary_factor", 1.0)
    if factor != 1.0 and not partial:
        raise CheckpointError(
            f"{cfg.source}: partial_rotary_factor {factor} is not used by this family; only 1.0 is supported"
        )
    rotary_dim = int(head_dim * factor)
    if not 1 <= rotary_dim <= head_dim:
        raise CheckpointError(
            f"{cfg.source}: partial_rotary_factor {factor} of head_dim {head_dim} is {rotary_dim} elements; rope "
            f"turns 1 to {head_dim} of them"
        )
    if rotary_dim == head_dim and head_dim % 2:
        raise CheckpointError(f"{cfg.source}: head_dim {head_dim} is odd; rope turns pairs of elements")
    return rotary_dim


def _checked_rope_values(
    cfg: HFConfig, kind: str, values: Mapping[str, Any], rotary_dim: int
) -> dict[str, Any]:
    """The values of ``kind``, each of its type; the keys it does not use are left out."""
    used: dict[str, Any] = {}
    for key in ROPE_KEYS[kind]:
        if values.get(key) is None:
            raise CheckpointError(f"{cfg.source}: rope_type {kind!r} needs {key!r} in rope_parameters")
    for key in ("factor", "low_freq_factor", "high_freq_factor"):
        if key in ROPE_KEYS[kind]:
            used[key] = _positive(cfg, float, values, key)
    for key in ("short_factor", "long_factor"):
        if key in ROPE_KEYS[kind]:
            used[key] = tuple(cfg.typed(float, key, value) for value in cfg.typed(list, key, values[key]))
            if len(used[key]) != rotary_dim // 2:
                raise CheckpointError(
                    f"{cfg.source}: rope {key} must have {rotary_dim // 2} values, found {len(used[key])}"
                )
    if kind in ("yarn", "longrope", "llama3"):
        used["original_max_position_embeddings"] = values["original_max_position_embeddings"]
    if kind in ("yarn", "longrope") and "attention_factor" in values:
        used["attention_factor"] = cfg.typed(float, "attention_factor", values["attention_factor"])
    if kind == "yarn":
        for key in ("beta_fast", "beta_slow", "mscale", "mscale_all_dim"):
            if key in values:
                used[key] = cfg.typed(float, key, values[key])
        used["truncate"] = cfg.typed(bool, "truncate", values.get("truncate", True))
    return used


def _positive(
    cfg: HFConfig, kind: type[Any], values: Mapping[str, Any], key: str, default: Any = None
) -> Any:
    """``values[key]`` (or ``default``) as ``kind``, above 0."""
    value = cfg.typed(kind, key, values.get(key, default))
    if value <= 0:
        raise CheckpointError(f"{cfg.source}: key {key!r} must be above 0, found {value}")
    return value


def context_length(cfg: HFConfig, rope: RopeSpec, max_model_len: int | None) -> int:
    """Positions the model can serve: max_position_embeddings, stretched where the rope scaling adds to it.

    Dynamic scaling stretches only as far as ``max_model_len`` asks: its frequencies depend on the length.
    """
    stated = cfg.count("max_position_embeddings")
    factor = rope.parameters.get("factor", 1.0)
    if rope.kind == "linear":
        return int(stated * factor)
    if rope.kind == "yarn":
        return max(stated, int(rope.parameters["original_max_position_embeddings"] * factor))
    if rope.kind == "dynamic":
        return min(max(stated, max_model_len or stated), int(stated * factor))
    return stated


def place_in_groups(layers: Sequence[LayerSpec]) -> tuple[tuple[LayerSpec, ...], tuple[KVGroupSpec, ...]]:
    """``layers`` with their mixers' kv_group and kv_index set, and the groups: one a distinct KV shape and window."""
    members: dict[tuple[int | None, int, int, int], list[int]] = {}
    placed = []
    for index, layer in enumerate(layers):
        mixer = layer.mixer
        if not isinstance(mixer, AttentionSpec):
            raise TypeError("place_in_groups places attention layers only")
        key = (mixer.window, mixer.num_kv_heads, mixer.head_dim, mixer.v_head_dim)
        group = members.setdefault(key, [])
        mixer = replace(mixer, kv_group=list(members).index(key), kv_index=len(group))
        group.append(index)
        placed.append(replace(layer, mixer=mixer))
    groups = tuple(
        KVGroupSpec(
            kind="full" if window is None else "window",
            layers=tuple(indices),
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            v_head_dim=v_head_dim,
            window=window,
        )
        for (window, kv_heads, head_dim, v_head_dim), indices in members.items()
    )
    return tuple(placed), groups


def weight_map(
    spec: DecoderSpec, names: Mapping[str, str] = HF_NAMES, layers: str = "model.layers"
) -> WeightMap:
    """Where each parameter of ``spec`` lies, by a table of module names and the name of the list of layers.

    A tied model's head is named too: some checkpoints hold one that differs from the embedding.
    """
    found = {"head.weight": WeightRef(name=f"{names['head']}.weight")}
    for parameter in parameters(spec):
        module, _, kind = parameter.name.rpartition(".")
        if module.startswith("layers."):
            _, index, local = module.split(".", 2)
            found[parameter.name] = WeightRef(name=f"{layers}.{index}.{names[local]}.{kind}")
        else:
            found[parameter.name] = WeightRef(name=f"{names[module]}.{kind}")
    return found
