"""SmolLM3: Llama's layout, where every fourth layer has no rope, and may have a window instead."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from kvpage.api.model import LayerSpec, MLPSpec, ModelDefinition, NormSpec
from kvpage.errors import CheckpointError
from kvpage.models.hf_config import HFConfig
from kvpage.models.layer_types import FULL, SLIDING, read_layer_types, read_windows
from kvpage.models.layouts import attention_spec, decoder_spec
from kvpage.models.translation import context_length, read_activation, read_heads, read_rope, weight_map

DEFAULTS: dict[str, Any] = {
    "num_key_value_heads": 4,
    "max_position_embeddings": 32768,
    "rope_theta": 2000000.0,
    "tie_word_embeddings": True,
}


def translate(cfg: HFConfig, *, max_model_len: int | None) -> ModelDefinition:
    """``cfg`` as a model; ``max_model_len`` only fixes the frequencies of dynamic rope.

    Raises:
        CheckpointError: a key is missing, of another type, or holds a value this family does not run.
    """
    cfg = cfg.with_defaults(DEFAULTS)
    heads = read_heads(cfg)
    rope = read_rope(cfg, heads[2], max_model_len=max_model_len)
    bias = cfg.get(bool, "attention_bias", False)
    attention = attention_spec(heads, qkv_bias=bias, out_bias=bias)
    norm = NormSpec(kind="rms", eps=cfg.get(float, "rms_norm_eps", 1e-6))
    layer = LayerSpec(
        mixer=attention,
        ffn=MLPSpec(
            intermediate_size=cfg.count("intermediate_size"),
            activation=read_activation(cfg),
            bias=cfg.get(bool, "mlp_bias", False),
        ),
        mixer_norm_before=norm,
        ffn_norm_before=norm,
    )
    turns = layers_with_rope(cfg)
    slides = cfg.get(bool, "use_sliding_window", False) and cfg.get(int, "sliding_window", None) is not None
    types = read_layer_types(cfg, [SLIDING if slides and not turned else FULL for turned in turns])
    layers = [
        replace(layer, mixer=replace(attention, window=window, rope=rope if turned else None))
        for window, turned in zip(read_windows(cfg, types), turns, strict=True)
    ]
    context = context_length(cfg, rope, max_model_len)
    spec = decoder_spec(cfg, "smollm3", layers, max_position=context, final_norm=norm)
    return ModelDefinition(spec=spec, weights=weight_map(spec))


def layers_with_rope(cfg: HFConfig) -> tuple[bool, ...]:
    """Which layers turn q and k: by ``no_rope_layers`` (where 1 means that it does), else all but every n-th."""
    count = cfg.num_layers
    stated = cfg.get(list, "no_rope_layers", None)
    if stated is None:
        interval = cfg.count("no_rope_layer_interval", 4)
        return tuple((index + 1) % interval != 0 for index in range(count))
    if len(stated) < count:
        raise CheckpointError(
            f"{cfg.source}: no_rope_layers must have {count} entries (num_hidden_layers), has {len(stated)}"
        )
    wrong = [value for value in stated[:count] if value not in (0, 1)]
    if wrong:
        raise CheckpointError(f"{cfg.source}: no_rope_layers must hold 0 and 1 only, found {wrong[0]!r:.80}")
    return tuple(bool(value) for value in stated[:count])
