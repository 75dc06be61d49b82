"""StarCoder2: layer norms, a plain MLP, biases throughout, and a window in every layer where asked."""

from __future__ import annotations

from dataclasses import replace

from kvpage.api.model import LayerSpec, MLPSpec, ModelDefinition, NormSpec
from kvpage.models.hf_config import HFConfig
from kvpage.models.layouts import attention_spec, decoder_spec, window_of_all_layers
from kvpage.models.translation import (
    HF_NAMES,
    context_length,
    read_activation,
    read_heads,
    read_rope,
    weight_map,
)

DEFAULTS = {
    "num_key_value_heads": 2,
    "hidden_act": "gelu_pytorch_tanh",
    "max_position_embeddings": 4096,
    "norm_epsilon": 1e-5,
    "use_bias": True,
    "tie_word_embeddings": True,
}
NAMES = {**HF_NAMES, "mlp.up": "mlp.c_fc", "mlp.down": "mlp.c_proj"}


def translate(cfg: HFConfig, *, max_model_len: int | None) -> ModelDefinition:
    """``cfg`` as a model; ``max_model_len`` only fixes the frequencies of dynamic rope.

    Raises:
        CheckpointError: a key is missing, of another type, or holds a value this family does not run.
    """
    cfg = cfg.with_defaults(DEFAULTS)
    heads = read_heads(cfg)
    rope = read_rope(cfg, heads[-1], max_model_len=max_model_len)
    norm = NormSpec(kind="layer", eps=cfg.get(float, "norm_epsilon"), bias=True)
    bias = cfg.get(bool, "use_bias")
    mixer = replace(
        attention_spec(heads, rope=rope, qkv_bias=bias, out_bias=bias), window=window_of_all_layers(cfg)
    )
    ffn = MLPSpec(
        intermediate_size=cfg.count("intermediate_size"),
        activation=read_activation(cfg),
        gated=False,
        bias=bias,
    )
    layer = LayerSpec(mixer=mixer, ffn=ffn, mixer_norm_before=norm, ffn_norm_before=norm)
    spec = decoder_spec(
        cfg,
        "starcoder2",
        [layer] * cfg.num_layers,
        max_position=context_length(cfg, rope, max_model_len),
        final_norm=norm,
    )
    return ModelDefinition(spec=spec, weights=weight_map(spec, NAMES))
