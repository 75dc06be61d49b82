"""GPT-NeoX and Pythia: layer norms, partial rope, attention and MLP in parallel or one after the other."""

from __future__ import annotations

from dataclasses import replace

from kvpage.api.model import LayerSpec, MLPSpec, ModelDefinition, NormSpec, WeightRef
from kvpage.models.fused_weights import head_by_head
from kvpage.models.hf_config import HFConfig
from kvpage.models.layouts import attention_spec, decoder_spec
from kvpage.models.translation import (
    HF_NAMES,
    context_length,
    read_activation,
    read_plain_heads,
    read_rope,
    weight_map,
)

DEFAULTS = {"max_position_embeddings": 2048, "layer_norm_eps": 1e-5, "partial_rotary_factor": 0.25}
OWN_KEYS = {"partial_rotary_factor": "rotary_pct", "rope_theta": "rotary_emb_base"}
NAMES = {
    **HF_NAMES,
    "embed": "gpt_neox.embed_in",
    "final_norm": "gpt_neox.final_layer_norm",
    "head": "embed_out",
    **dict.fromkeys(("attention.q", "attention.k", "attention.v"), "attention.query_key_value"),
    "attention.out": "attention.dense",
    "mlp.up": "mlp.dense_h_to_4h",
    "mlp.down": "mlp.dense_4h_to_h",
}


def translate(cfg: HFConfig, *, max_model_len: int | None) -> ModelDefinition:
    """``cfg`` as a model; ``max_model_len`` only fixes the frequencies of dynamic rope.

    Raises:
        CheckpointError: a key is missing, of another type, or holds a value this family does not run.
    """
    cfg = cfg.renamed(OWN_KEYS).with_defaults(DEFAULTS)
    heads = read_plain_heads(cfg)
    rope = read_rope(cfg, heads[-1], max_model_len=max_model_len, partial=True)
    norm = NormSpec(kind="layer", eps=cfg.get(float, "layer_norm_eps"), bias=True)
    bias = cfg.get(bool, "attention_bias", True)
    ffn = MLPSpec(
        intermediate_size=cfg.count("intermediate_size"),
        activation=read_activation(cfg, default="gelu"),
        gated=False,
        bias=True,
    )
    layer = LayerSpec(
        mixer=attention_spec(heads, rope=rope, qkv_bias=bias, out_bias=bias),
        ffn=ffn,
        mixer_norm_before=norm,
        ffn_norm_before=norm,
        residual="parallel" if cfg.get(bool, "use_parallel_residual", True) else "sequential",
    )
    spec = decoder_spec(
        cfg,
        "gpt_neox",
        [layer] * cfg.num_layers,
        max_position=context_length(cfg, rope, max_model_len),
        final_norm=norm,
    )
    weights = dict(head_by_head(weight_map(spec, NAMES, "gpt_neox.layers"), heads[-1]))
    # transformers 5 calls it "lm_head" in memory, and "embed_out" in files as before.
    weights["head.weight"] = replace(weights["head.weight"], otherwise=WeightRef(name="lm_head.weight"))
    return ModelDefinition(spec=spec, weights=weights)
