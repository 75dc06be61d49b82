"""StableLM: layer norms around a gated MLP, partial rope, attention and MLP in parallel where asked."""

from __future__ import annotations

from kvpage.api.model import LayerSpec, MLPSpec, ModelDefinition, NormSpec
from kvpage.models.hf_config import HFConfig
from kvpage.models.layouts import attention_spec, decoder_spec
from kvpage.models.translation import (
    context_length,
    read_activation,
    read_heads,
    read_rope,
    require,
    weight_map,
)

DEFAULTS = {
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
    "layer_norm_eps": 1e-5,
    "partial_rotary_factor": 0.25,
}


def translate(cfg: HFConfig, *, max_model_len: int | None) -> ModelDefinition:
    """``cfg`` as a model; ``max_model_len`` only fixes the frequencies of dynamic rope.

    Raises:
        CheckpointError: a key is missing, of another type, or holds a value this family does not run.
    """
    cfg = cfg.with_defaults(DEFAULTS)
    require(cfg, "qk_layernorm", False)
    heads = read_heads(cfg)
    rope = read_rope(cfg, heads[-1], max_model_len=max_model_len, partial=True)
    norm = NormSpec(kind="layer", eps=cfg.get(float, "layer_norm_eps"), bias=True)
    parallel = cfg.get(bool, "use_parallel_residual", False)
    layer = LayerSpec(
        mixer=attention_spec(heads, rope=rope, qkv_bias=cfg.get(bool, "use_qkv_bias", False)),
        ffn=MLPSpec(intermediate_size=cfg.count("intermediate_size"), activation=read_activation(cfg)),
        mixer_norm_before=norm,
        ffn_norm_before=None if parallel else norm,
        residual="parallel" if parallel else "sequential",
    )
    spec = decoder_spec(
        cfg,
        "stablelm",
        [layer] * cfg.num_layers,
        max_position=context_length(cfg, rope, max_model_len),
        final_norm=norm,
    )
    return ModelDefinition(spec=spec, weights=weight_map(spec))
