"""DeepSeek-V2: latent attention; after the first layers experts, and a wider one that all tokens share."""

from __future__ import annotations

import math
from dataclasses import replace

from kvpage.api.model import (
    AttentionSpec,
    ExpertGroups,
    LayerSpec,
    MLPSpec,
    ModelDefinition,
    MoESpec,
    NormSpec,
)
from kvpage.errors import CheckpointError
from kvpage.models.experts import read_moe, with_experts
from kvpage.models.hf_config import HFConfig
from kvpage.models.latent_attention import HF_NAMES as LATENT_NAMES
from kvpage.models.latent_attention import LatentAttentionSpec
from kvpage.models.layouts import decoder_spec
from kvpage.models.translation import HF_NAMES, context_length, read_activation, read_rope

DEFAULTS = {
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "moe_intermediate_size": 1407,
}
DEFAULT_Q_RANK = 1536
TOP_K_METHODS = ("greedy", "group_limited_greedy")


def translate(cfg: HFConfig, *, max_model_len: int | None) -> ModelDefinition:
    """``cfg`` as a model; ``norm_topk_prob`` is not used, as in transformers.

    Raises:
        CheckpointError: a key is missing, of another type, or holds a value this family does not run.
    """
    cfg = cfg.renamed({"n_routed_experts": "num_experts"}).with_defaults(DEFAULTS)
    method = cfg.get(str, "topk_method", "greedy")
    if method not in TOP_K_METHODS:
        raise CheckpointError(
            f"{cfg.source}: topk_method {method!r} is unknown; kvpage has {', '.join(TOP_K_METHODS)}"
        )
    bias = cfg.get(bool, "mlp_bias", False)
    moe = replace(
        read_deepseek_moe(cfg, bias=bias),
        renormalise=False,
        groups=read_groups(cfg, score="best") if method == "group_limited_greedy" else None,
        scale=cfg.get(float, "routed_scaling_factor", 1.0),
    )
    return deepseek(
        cfg, "deepseek_v2", moe, first_moe=cfg.get(int, "first_k_dense_replace", 0), mlp_bias=bias,
        interleaved=True, max_model_len=max_model_len,
    )  # fmt: skip


def read_deepseek_moe(cfg: HFConfig, *, bias: bool = False) -> MoESpec:
    """Experts, and the one that is shared; the router computes in float32."""
    shared = MLPSpec(
        intermediate_size=cfg.count("moe_intermediate_size") * cfg.count("n_shared_experts"),
        activation=read_activation(cfg),
        bias=bias,
    )
    moe = read_moe(cfg, experts="n_routed_experts", renormalise=True, shared=shared)
    return replace(moe, shared_gate=False, float32_router=True)


def read_groups(cfg: HFConfig, *, score: str) -> ExpertGroups:
    """``n_group`` and ``topk_group``.

    Raises:
        CheckpointError: experts do not divide into them, or those chosen have too few experts.
    """
    count, chosen, experts = cfg.count("n_group"), cfg.count("topk_group"), cfg.count("n_routed_experts")
    size, top_k = experts // count, cfg.count("num_experts_per_tok")
    least = 1 if score == "best" else 2
    if experts % count or chosen > count or size * chosen < top_k or size < least:
        raise CheckpointError(
            f"{cfg.source}: n_group {count} and topk_group {chosen} do not fit n_routed_experts {experts} and "
            f"num_experts_per_tok {top_k}; groups must be of one size, {least} at least, and those chosen must "
            "have enough experts"
        )
    return ExpertGroups(count=count, chosen=chosen, score="best" if score == "best" else "best_two")


def deepseek(
    cfg: HFConfig,
    family: str,
    moe: MoESpec,
    *,
    first_moe: int,
    mlp_bias: bool,
    interleaved: bool,
    max_model_len: int | None,
) -> ModelDefinition:
    """A model of DeepSeek's layout: plain MLPs up to layer ``first_moe``, ``moe`` from there on."""
    mixer = read_latent_attention(cfg, interleaved=interleaved, max_model_len=max_model_len)
    norm = NormSpec(kind="rms", eps=cfg.get(float, "rms_norm_eps", 1e-6))
    mlp = MLPSpec(
        intermediate_size=cfg.count("intermediate_size"), activation=read_activation(cfg), bias=mlp_bias
    )
    rope = mixer.attention.rope
    assert rope is not None, "latent attention always turns a part of its heads"
    plain = LayerSpec(mixer=mixer.attention, ffn=mlp, mixer_norm_before=norm, ffn_norm_before=norm)
    spec = decoder_spec(
        cfg,
        family,
        [plain] * cfg.num_layers,
        max_position=context_length(cfg, rope, max_model_len),
        final_norm=norm,
    )
    layers = tuple(
        replace(layer, mixer=replace(mixer, attention=placed))
        for layer, placed in zip(spec.layers, spec.attention, strict=True)
    )
    return with_experts(
        replace(spec, layers=layers),
        [moe if index >= first_moe else None for index in range(cfg.num_layers)],
        shared="shared_experts",
        names={**HF_NAMES, **LATENT_NAMES},
    )


def read_latent_attention(
    cfg: HFConfig, *, interleaved: bool, max_model_len: int | None
) -> LatentAttentionSpec:
    """Latent attention; ``kv_group`` and ``kv_index`` of its ``attention`` are not yet set."""
    heads = cfg.count("num_attention_heads")
    if cfg.get(int, "num_key_value_heads", heads) != heads:
        raise CheckpointError(
            f"{cfg.source}: num_key_value_heads {cfg.get(int, 'num_key_value_heads')} must equal "
            f"num_attention_heads {heads}: latent attention has keys for every head"
        )
    rope_dim, nope_dim = cfg.count("qk_rope_head_dim"), cfg.count("qk_nope_head_dim")
    value_dim = cfg.count("v_head_dim")
    width = max(rope_dim + nope_dim, value_dim)
    absent = "q_lora_rank" in cfg and cfg.get(int, "q_lora_rank", None) is None
    rope = replace(read_rope(cfg, rope_dim, max_model_len=max_model_len), interleaved=interleaved)
    return LatentAttentionSpec(
        attention=AttentionSpec(
            num_heads=heads,
            num_kv_heads=heads,
            head_dim=width,
            v_head_dim=width,
            scale=(rope_dim + nope_dim) ** -0.5 * _rope_scale(cfg),
            kv_group=0,
            kv_index=0,
            rope=rope,
        ),
        rope_dim=rope_dim,
        nope_dim=nope_dim,
        value_dim=value_dim,
        kv_rank=cfg.count("kv_lora_rank"),
        q_rank=None if absent else cfg.count("q_lora_rank", DEFAULT_Q_RANK),
        bias=cfg.get(bool, "attention_bias", False),
    )


def _rope_scale(cfg: HFConfig) -> float:
    """What a rope that was stretched after training multiplies the scores with."""
    values = cfg.rope_parameters()
    share = cfg.typed(float, "mscale_all_dim", values.get("mscale_all_dim", 0.0))
    if values["rope_type"] == "default" or not share:
        return 1.0
    factor = cfg.typed(float, "factor", values.get("factor"))
    return (0.1 * share * math.log(factor) + 1.0) ** 2 if factor > 1 else 1.0
