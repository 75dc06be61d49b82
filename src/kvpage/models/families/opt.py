"""OPT: learned positions that begin at row 2, layer norms, relu; as in all sizes but 350m."""

from __future__ import annotations

from kvpage.api.model import EmbeddingSpec, LayerSpec, MLPSpec, ModelDefinition, NormSpec
from kvpage.errors import CheckpointError
from kvpage.models.hf_config import HFConfig
from kvpage.models.layouts import attention_spec, decoder_spec
from kvpage.models.translation import HF_NAMES, read_activation, read_plain_heads, require, weight_map

DEFAULTS = {"max_position_embeddings": 2048, "activation_function": "relu", "tie_word_embeddings": True}
FIRST_POSITION = 2
NORM = NormSpec(kind="layer", eps=1e-5, bias=True)
NAMES = {
    **HF_NAMES,
    "embed": "model.decoder.embed_tokens",
    "positions": "model.decoder.embed_positions",
    "final_norm": "model.decoder.final_layer_norm",
    "mixer_norm_before": "self_attn_layer_norm",
    "ffn_norm_before": "final_layer_norm",
    "attention.out": "self_attn.out_proj",
    "mlp.up": "fc1",
    "mlp.down": "fc2",
}


def translate(cfg: HFConfig, *, max_model_len: int | None) -> ModelDefinition:
    """``cfg`` as a model; nothing depends on ``max_model_len``.

    Raises:
        CheckpointError: a key is missing, of another type, or holds a value this family does not run.
    """
    cfg = cfg.with_defaults(DEFAULTS)
    require(cfg, "do_layer_norm_before", True)
    require(cfg, "layer_norm_elementwise_affine", True)
    require(cfg, "_remove_final_layer_norm", False)
    hidden, positions = cfg.count("hidden_size"), cfg.count("max_position_embeddings")
    projected = cfg.get(int, "word_embed_proj_dim", hidden)
    if projected != hidden:
        raise CheckpointError(
            f"{cfg.source}: key 'word_embed_proj_dim' is {projected}; only hidden_size ({hidden}) is supported"
        )
    bias = cfg.get(bool, "enable_bias", True)
    ffn = MLPSpec(
        intermediate_size=cfg.count("ffn_dim"),
        activation=read_activation(cfg, "activation_function"),
        gated=False,
        bias=bias,
    )
    layer = LayerSpec(
        mixer=attention_spec(read_plain_heads(cfg), qkv_bias=bias, out_bias=bias),
        ffn=ffn,
        mixer_norm_before=NORM,
        ffn_norm_before=NORM,
    )
    spec = decoder_spec(
        cfg,
        "opt",
        [layer] * cfg.num_layers,
        max_position=positions,
        final_norm=NORM,
        embedding=EmbeddingSpec(positions=positions, position_offset=FIRST_POSITION),
    )
    return ModelDefinition(spec=spec, weights=weight_map(spec, NAMES, "model.decoder.layers"))
