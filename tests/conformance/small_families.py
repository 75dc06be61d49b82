"""Configs of tiny models, a Llama written a second time as its oracle, and families with one mistake each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import count
from typing import Any

import torch

from kvpage.api.model import AttentionSpec, DecoderSpec, LayerSpec, ModelConfig, ModelDefinition
from kvpage.models.families import llama
from kvpage.testing.model_families import Oracle

LLAMA: dict[str, Any] = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 96, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
}  # fmt: skip
GEMMA2: dict[str, Any] = {
    **LLAMA, "head_dim": 8, "num_hidden_layers": 3, "sliding_window": 7, "query_pre_attn_scalar": 16,
    "hidden_activation": "gelu_pytorch_tanh",
}  # fmt: skip


def llama_oracle(config: Mapping[str, Any]) -> Oracle:
    """Random weights under Hugging Face's names; dense attention in float64."""
    tensors = _llama_tensors(config)
    exact = {name: tensor.double() for name, tensor in tensors.items()}
    eps, heads, kv_heads = (config[k] for k in ("rms_norm_eps", "num_attention_heads", "num_key_value_heads"))
    size = config["hidden_size"] // heads

    def norm(name: str, x: torch.Tensor) -> torch.Tensor:
        return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * exact[f"{name}.weight"]

    def turned(x: torch.Tensor) -> torch.Tensor:
        powers = torch.arange(0, size, 2, dtype=torch.float64) / size
        angle = torch.arange(len(x), dtype=torch.float64)[:, None, None] / config["rope_theta"] ** powers
        a, b = x.chunk(2, -1)
        return torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()), -1)

    def logits(tokens: Sequence[int]) -> torch.Tensor:
        x, length = exact["model.embed_tokens.weight"][list(tokens)], len(tokens)
        later = torch.ones(length, length).triu(1).bool()
        for index in range(config["num_hidden_layers"]):
            layer = f"model.layers.{index}"

            def linear(name: str, given: torch.Tensor, layer: str = layer) -> torch.Tensor:
                return given @ exact[f"{layer}.{name}.weight"].T

            y = norm(f"{layer}.input_layernorm", x)
            q = turned(linear("self_attn.q_proj", y).view(length, heads, size))
            k = turned(linear("self_attn.k_proj", y).view(length, kv_heads, size)).repeat_interleave(
                heads // kv_heads, 1
            )
            v = (
                linear("self_attn.v_proj", y)
                .view(length, kv_heads, size)
                .repeat_interleave(heads // kv_heads, 1)
            )
            scores = torch.einsum("qhd,khd->hqk", q, k) / size**0.5
            shares = scores.masked_fill(later, -torch.inf).softmax(-1)
            x = x + linear("self_attn.o_proj", torch.einsum("hqk,khd->qhd", shares, v).reshape(length, -1))
            y = norm(f"{layer}.post_attention_layernorm", x)
            gate = linear("mlp.gate_proj", y)
            x = x + linear("mlp.down_proj", gate * gate.sigmoid() * linear("mlp.up_proj", y))
        return norm("model.norm", x) @ exact["lm_head.weight"].T

    return tensors, logits


def _llama_tensors(config: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    kv = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    layer = {
        "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (kv, hidden), "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, hidden), "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner), "input_layernorm": (hidden,), "post_attention_layernorm": (hidden,),
    }  # fmt: skip
    shapes = {
        f"model.layers.{i}.{name}": s for i in range(config["num_hidden_layers"]) for name, s in layer.items()
    }
    shapes |= {"model.embed_tokens": (config["vocab_size"], hidden), "model.norm": (hidden,)}
    shapes |= {"lm_head": (config["vocab_size"], hidden)}
    generator = torch.Generator().manual_seed(1)
    return {
        f"{name}.weight": torch.randn(shape, generator=generator) * 0.25 + (len(shape) == 1)
        for name, shape in shapes.items()
    }


def _changed(
    cfg: ModelConfig, max_model_len: int | None, change: Callable[[DecoderSpec], DecoderSpec]
) -> ModelDefinition:
    found = llama.translate(cfg, max_model_len=max_model_len)  # type: ignore[arg-type]
    return replace(found, spec=change(found.spec))


def _with_mixers(spec: DecoderSpec, change: Callable[[int, AttentionSpec], AttentionSpec]) -> DecoderSpec:
    def changed(index: int, layer: LayerSpec) -> LayerSpec:
        assert isinstance(layer.mixer, AttentionSpec)
        return replace(layer, mixer=change(index, layer.mixer))

    return replace(spec, layers=tuple(changed(index, layer) for index, layer in enumerate(spec.layers)))


def values_read_from_keys(cfg: ModelConfig, *, max_model_len: int | None) -> ModelDefinition:
    found = _changed(cfg, max_model_len, lambda spec: spec)
    wrong = {"layers.1.attention.v.weight": found.weights["layers.1.attention.k.weight"]}
    return replace(found, weights={**found.weights, **wrong})


def a_norm_forgotten(cfg: ModelConfig, *, max_model_len: int | None) -> ModelDefinition:
    found = _changed(cfg, max_model_len, lambda spec: spec)
    return replace(found, weights={n: ref for n, ref in found.weights.items() if n != "final_norm.weight"})


def a_bias_too_many(cfg: ModelConfig, *, max_model_len: int | None) -> ModelDefinition:
    found = _changed(cfg, max_model_len, lambda spec: spec)
    return replace(found, weights={**found.weights, "head.bias": found.weights["head.weight"]})


def one_kv_tensor_for_all(cfg: ModelConfig, *, max_model_len: int | None) -> ModelDefinition:
    def first(index: int, mixer: AttentionSpec) -> AttentionSpec:
        return replace(mixer, kv_index=0)

    return _changed(cfg, max_model_len, lambda spec: _with_mixers(spec, first))


def context_cut_to_what_is_asked(cfg: ModelConfig, *, max_model_len: int | None) -> ModelDefinition:
    return _changed(
        cfg, max_model_len, lambda spec: replace(spec, max_position=max_model_len or spec.max_position)
    )


def context_of_its_own(cfg: ModelConfig, *, max_model_len: int | None) -> ModelDefinition:
    return _changed(cfg, max_model_len, lambda spec: replace(spec, max_position=2048))


def reads_what_may_be_missing(cfg: ModelConfig, *, max_model_len: int | None) -> ModelDefinition:
    assert cfg.get(int, "num_key_value_heads", None) * 1
    return _changed(cfg, max_model_len, lambda spec: spec)


def hides_what_is_missing(cfg: ModelConfig, *, max_model_len: int | None) -> ModelDefinition:
    from kvpage import CheckpointError

    try:
        return _changed(cfg, max_model_len, lambda spec: spec)
    except CheckpointError:
        raise CheckpointError("this config is no good") from None


def scaled_by_another_size(cfg: ModelConfig, *, max_model_len: int | None) -> ModelDefinition:
    def wrong(index: int, mixer: AttentionSpec) -> AttentionSpec:
        return replace(mixer, scale=mixer.scale * 0.5)

    return _changed(cfg, max_model_len, lambda spec: _with_mixers(spec, wrong))


def a_dict_it_returns(cfg: ModelConfig, *, max_model_len: int | None) -> Any:
    return {"spec": None}


CALLS = count()


def another_at_every_call(cfg: ModelConfig, *, max_model_len: int | None) -> ModelDefinition:
    return _changed(cfg, max_model_len, lambda spec: replace(spec, family=f"family {next(CALLS)}"))
