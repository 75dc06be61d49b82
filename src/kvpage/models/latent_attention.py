"""Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434) as a mixer of its own, through the public contract."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from kvpage.api.model import AttentionSpec, DecoderEnv, Mixer
from kvpage.errors import CheckpointError
from kvpage.models.hf_config import HFConfig
from kvpage.models.translation import read_rope

if TYPE_CHECKING:
    from kvpage.api.quant import WeightForm

HF_NAMES: Mapping[str, str] = {
    "mixer.q": "self_attn.q_proj",
    "mixer.q_a": "self_attn.q_a_proj",
    "mixer.q_a_norm": "self_attn.q_a_layernorm",
    "mixer.q_b": "self_attn.q_b_proj",
    "mixer.kv_a": "self_attn.kv_a_proj_with_mqa",
    "mixer.kv_a_norm": "self_attn.kv_a_layernorm",
    "mixer.kv_b": "self_attn.kv_b_proj",
    "mixer.out": "self_attn.o_proj",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class LatentAttentionSpec:
    """Keys and values are made of a narrow latent a token; one rotated part of the key is shared by all heads.

    The latent is expanded before it is cached: to any backend this is plain multi-head attention. Its heads have
    the rotated elements first, then the others; whichever of key and value is the narrower is filled with zeros
    (why: docs/adr/0004).

    Attributes:
        attention: what is handed to ``ctx.attend``: ``num_heads`` equals ``num_kv_heads``, ``head_dim`` equals
            ``v_head_dim`` and is the larger of ``rope_dim + nope_dim`` and ``value_dim``.
        rope_dim, nope_dim, value_dim: elements of a head that turn, of its key that do not, of its value.
        kv_rank, q_rank: size of the latents; ``q_rank=None``: queries are made without one.
        bias: of the products into latents and of the output.
        eps: of the norms of the latents.
    """

    attention: AttentionSpec
    rope_dim: int
    nope_dim: int
    value_dim: int
    kv_rank: int
    q_rank: int | None = None
    bias: bool = False
    eps: float = 1e-6

    def parameters(self, hidden_size: int) -> Mapping[str, tuple[int, ...]]:
        heads = self.attention.num_heads
        queries = heads * (self.nope_dim + self.rope_dim)
        found: dict[str, tuple[int, ...]] = {}
        if self.q_rank is None:
            found["q.weight"] = (queries, hidden_size)
        else:
            found |= self._linear("q_a", self.q_rank, hidden_size)
            found["q_a_norm.weight"] = (self.q_rank,)
            found["q_b.weight"] = (queries, self.q_rank)
        found |= self._linear("kv_a", self.kv_rank + self.rope_dim, hidden_size)
        found["kv_a_norm.weight"] = (self.kv_rank,)
        found["kv_b.weight"] = (heads * (self.nope_dim + self.value_dim), self.kv_rank)
        return found | self._linear("out", hidden_size, heads * self.value_dim)

    def build(self, weights: Mapping[str, WeightForm], env: DecoderEnv) -> Mixer:
        # torch is needed to run a model, not to plan one.
        from kvpage.nn.latent_attention import LatentAttention

        return LatentAttention(
            self.attention,
            (self.rope_dim, self.nope_dim, self.value_dim),
            weights,
            env,
            eps=self.eps,
        )

    def _linear(self, name: str, outputs: int, inputs: int) -> dict[str, tuple[int, ...]]:
        found: dict[str, tuple[int, ...]] = {f"{name}.weight": (outputs, inputs)}
        if self.bias:
            found[f"{name}.bias"] = (outputs,)
        return found


def read_latent_attention(
    cfg: HFConfig, *, interleaved: bool, max_model_len: int | None
) -> LatentAttentionSpec:
    """Latent attention as a config states it; the KV group of its ``attention`` is not yet set.

    Raises:
        CheckpointError: a key is missing, or there are fewer KV heads than heads.
    """
    heads = cfg.count("num_attention_heads")
    if cfg.get(int, "num_key_value_heads", heads) != heads:
        raise CheckpointError(
            f"{cfg.source}: num_key_value_heads {cfg.get(int, 'num_key_value_heads')} must equal "
            f"num_attention_heads {heads}: latent attention has keys for every head"
        )
    rope_dim, nope_dim = cfg.count("qk_rope_head_dim"), cfg.count("qk_nope_head_dim")
    value_dim = cfg.count("v_head_dim")
    width = max(rope_dim + nope_dim, value_dim)
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
        q_rank=None if cfg.get(int, "q_lora_rank", None) is None else cfg.count("q_lora_rank"),
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
