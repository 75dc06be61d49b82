"""DeepSeek-V2: latent attention; after the first layers experts, and a wider one that all tokens share."""

from __future__ import annotations

from dataclasses import replace

from kvpage.api.model import LayerSpec, MLPSpec, ModelDefinition, MoESpec, NormSpec
from kvpage.errors import CheckpointError
from kvpage.models.experts import read_groups, read_moe, with_experts
from kvpage.models.hf_config import HFConfig
from kvpage.models.latent_attention import HF_NAMES as LATENT_NAMES
from kvpage.models.latent_attention import read_latent_attention
from kvpage.models.layouts import decoder_spec
from kvpage.models.translation import HF_NAMES, context_length, read_activation

DEFAULTS = {
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "moe_intermediate_size": 1407,
}
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
