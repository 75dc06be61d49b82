"""Llama 1 to 3.x, and what shares its layout."""

from __future__ import annotations

from kvpage.api.model import (
    AttentionSpec,
    DecoderSpec,
    EmbeddingSpec,
    HeadSpec,
    LayerSpec,
    MLPSpec,
    ModelDefinition,
    NormSpec,
    QKNormSpec,
    RopeSpec,
)
from kvpage.models.hf_config import HFConfig
from kvpage.models.translation import (
    context_length,
    place_in_groups,
    read_activation,
    read_heads,
    read_rope,
    weight_map,
)


def translate(cfg: HFConfig, *, max_model_len: int | None) -> ModelDefinition:
    """``cfg`` as a model; ``max_model_len`` only fixes the frequencies of dynamic rope.

    Raises:
        CheckpointError: a key is missing, of another type, or holds a value this family does not run.
    """
    bias = cfg.get(bool, "attention_bias", False)
    return llama_like(
        cfg,
        family="llama",
        max_model_len=max_model_len,
        windows=(None,) * cfg.num_layers,
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=cfg.get(bool, "mlp_bias", False),
    )


def llama_like(
    cfg: HFConfig,
    *,
    family: str,
    max_model_len: int | None,
    windows: tuple[int | None, ...],
    qkv_bias: bool = False,
    out_bias: bool = False,
    mlp_bias: bool = False,
    qk_norm: bool = False,
    kv_heads: int | None = None,
    head_dim: int | None = None,
    rope: RopeSpec | None = None,
) -> ModelDefinition:
    """A model of Llama's layout: pre-norm, gated MLP, rope; ``windows`` has one entry a layer.

    ``kv_heads``, ``head_dim``: the family's own where the config does not say. ``rope``: where the family reads
    it in its own way.
    """
    heads, num_kv_heads, size = read_heads(cfg, kv_default=kv_heads, head_dim_default=head_dim)
    rope = rope or read_rope(cfg, size, max_model_len=max_model_len)
    norm = NormSpec(kind="rms", eps=cfg.get(float, "rms_norm_eps", 1e-6))
    mlp = MLPSpec(
        intermediate_size=cfg.count("intermediate_size"),
        activation=read_activation(cfg),
        gated=True,
        bias=mlp_bias,
    )
    attention = [
        AttentionSpec(
            num_heads=heads,
            num_kv_heads=num_kv_heads,
            head_dim=size,
            v_head_dim=size,
            scale=size**-0.5,
            kv_group=0,
            kv_index=0,
            window=window,
            qkv_bias=qkv_bias,
            out_bias=out_bias,
            qk_norm=QKNormSpec(norm=norm) if qk_norm else None,
            rope=rope,
        )
        for window in windows
    ]
    layers, groups = place_in_groups(
        [LayerSpec(mixer=mixer, ffn=mlp, mixer_norm_before=norm, ffn_norm_before=norm) for mixer in attention]
    )
    spec = DecoderSpec(
        family=family,
        vocab_size=cfg.count("vocab_size"),
        hidden_size=cfg.count("hidden_size"),
        max_position=context_length(cfg, rope, max_model_len),
        embedding=EmbeddingSpec(),
        layers=layers,
        final_norm=norm,
        head=HeadSpec(tied=cfg.get(bool, "tie_word_embeddings", False)),
        kv_groups=groups,
    )
    return ModelDefinition(spec=spec, weights=weight_map(spec))
