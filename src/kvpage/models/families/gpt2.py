"""GPT-2: learned positions, layer norms, a plain MLP, and matrices stored [in, out] with q, k and v in one."""

from __future__ import annotations

from dataclasses import replace

from kvpage.api.model import EmbeddingSpec, LayerSpec, MLPSpec, ModelDefinition, NormSpec
from kvpage.models.fused_weights import one_after_another, qkv_outputs, transposed
from kvpage.models.hf_config import HFConfig
from kvpage.models.layouts import attention_spec, decoder_spec
from kvpage.models.translation import read_activation, read_plain_heads, require, weight_map

DEFAULTS = {
    "vocab_size": 50257,
    "max_position_embeddings": 1024,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "tie_word_embeddings": True,
}
OWN_KEYS = {
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}
NAMES = {
    "embed": "transformer.wte",
    "positions": "transformer.wpe",
    "final_norm": "transformer.ln_f",
    "head": "lm_head",
    "mixer_norm_before": "ln_1",
    "ffn_norm_before": "ln_2",
    **dict.fromkeys(("attention.q", "attention.k", "attention.v"), "attn.c_attn"),
    "attention.out": "attn.c_proj",
    "mlp.up": "mlp.c_fc",
    "mlp.down": "mlp.c_proj",
}


def translate(cfg: HFConfig, *, max_model_len: int | None) -> ModelDefinition:
    """``cfg`` as a model; nothing depends on ``max_model_len``.

    Raises:
        CheckpointError: a key is of another type, or holds a value this family does not run.
    """
    cfg = cfg.renamed(OWN_KEYS).with_defaults(DEFAULTS)
    require(cfg, "add_cross_attention", False)
    heads, hidden, positions = (
        read_plain_heads(cfg),
        cfg.count("hidden_size"),
        cfg.count("max_position_embeddings"),
    )
    norm = NormSpec(kind="layer", eps=cfg.get(float, "layer_norm_epsilon"), bias=True)
    mixer = attention_spec(heads, qkv_bias=True, out_bias=True)
    scale = mixer.scale if cfg.get(bool, "scale_attn_weights") else 1.0
    by_layer = cfg.get(bool, "scale_attn_by_inverse_layer_idx")
    ffn = MLPSpec(
        intermediate_size=cfg.count("n_inner", 4 * hidden),
        activation=read_activation(cfg, "activation_function"),
        gated=False,
        bias=True,
    )
    layers = [
        LayerSpec(
            mixer=replace(mixer, scale=scale / (index + 1) if by_layer else scale),
            ffn=ffn,
            mixer_norm_before=norm,
            ffn_norm_before=norm,
        )
        for index in range(cfg.num_layers)
    ]
    spec = decoder_spec(
        cfg,
        "gpt2",
        layers,
        max_position=positions,
        final_norm=norm,
        embedding=EmbeddingSpec(positions=positions),
    )
    weights = one_after_another(weight_map(spec, NAMES, "transformer.h"), qkv_outputs(mixer))
    return ModelDefinition(spec=spec, weights=transposed(weights, ("q", "k", "v", "out", "up", "down")))
