"""One file as the model: greedy tokens of every architecture equal transformers' on the weights that it stands for."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from gguf_writer import BF16, F16, F32, Q4_0, Q8_0, write_model

from kvpage import Engine, SamplingParams

SIZES: dict[str, Any] = {
    "vocab_size": 199, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "rms_norm_eps": 1e-5,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
MIXED = {"attn_k": Q4_0, "ffn_down": Q8_0, "token_embd": Q8_0, "ffn_up": F16, "attn_v": BF16, "": Q8_0}
THETA = {"rope_type": "default", "rope_theta": 20000.0}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 20000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
LONG = {
    "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0 + 0.1 * i for i in range(6)],
    "long_factor": [1.5 + 0.5 * i for i in range(6)], "attention_factor": 1.3,
}  # fmt: skip


def llama3_factors(pairs: int) -> torch.Tensor:
    """What llama.cpp's converter works out of Llama 3.1's rope scaling."""
    found = []
    for index in range(pairs):
        wavelength = 2 * math.pi * 20000.0 ** (index / pairs)
        if wavelength < 32 / 4:
            found.append(1.0)
        elif wavelength > 32 / 1:
            found.append(8.0)
        else:
            smooth = (32 / wavelength - 1) / (4 - 1)
            found.append(1 / ((1 - smooth) / 8 + smooth))
    return torch.tensor(found)


CASES: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    "llama": ("llama", "LlamaForCausalLM", {"rope_parameters": THETA}, {"rope.freq_base": 20000.0, "vocab_size": 199}),
    "llama, biases, tied, one KV head": (
        "llama",
        "LlamaForCausalLM",
        {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, "num_key_value_heads": 1},
        {"rope.dimension_count": 16},
    ),
    "llama, larger heads, linear rope": (
        "llama",
        "LlamaForCausalLM",
        {"head_dim": 32, "rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
        {"attention.key_length": 32, "attention.value_length": 32, "rope.scaling.type": "linear",
         "rope.scaling.factor": 4.0},
    ),
    "llama 3.1's rope": (
        "llama", "LlamaForCausalLM", {"rope_parameters": LLAMA3}, {"rope.freq_base": 20000.0}
    ),
    "mixtral": (
        "llama",
        "MixtralForCausalLM",
        {"num_local_experts": 5, "num_experts_per_tok": 2},
        {"expert_count": 5, "expert_used_count": 2, "rope.freq_base": 1000000.0},
    ),
    "qwen2, yarn": (
        "qwen2",
        "Qwen2ForCausalLM",
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0,
                             "original_max_position_embeddings": 64}},
        {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 64},
    ),
    "qwen3": ("qwen3", "Qwen3ForCausalLM", {"head_dim": 32, "tie_word_embeddings": True},
              {"attention.key_length": 32, "attention.value_length": 32}),
    "gemma": ("gemma", "GemmaForCausalLM", {"head_dim": 32}, {"attention.key_length": 32}),
    "gemma2": (
        "gemma2",
        "Gemma2ForCausalLM",
        {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 9, "num_hidden_layers": 3},
        {"attention.key_length": 32, "attention.sliding_window": 9, "attn_logit_softcapping": 50.0,
         "final_logit_softcapping": 30.0},
    ),
    "gemma3": (
        "gemma3",
        "Gemma3ForCausalLM",
        {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 9, "num_hidden_layers": 7,
         "rope_parameters": {
             "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
             "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
         }},
        {"attention.key_length": 32, "attention.sliding_window": 9, "rope.freq_base": 1e6, "rope.scaling.type": "linear",
         "rope.scaling.factor": 8.0},
    ),
    "phi3, longrope of a part": (
        "phi3",
        "Phi3ForCausalLM",
        {"rope_parameters": LONG, "partial_rotary_factor": 0.75, "original_max_position_embeddings": 32,
         "sliding_window": 29},
        {"rope.dimension_count": 12, "rope.scaling.attn_factor": 1.3, "rope.scaling.original_context_length": 32, "attention.sliding_window": 29},
    ),
    "qwen2-moe": (
        "qwen2moe",
        "Qwen2MoeForCausalLM",
        {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": False,
         "shared_expert_intermediate_size": 64},
        {"expert_count": 5, "expert_used_count": 2, "expert_feed_forward_length": 32,
         "expert_shared_feed_forward_length": 64},
    ),
    "qwen3-moe": (
        "qwen3moe",
        "Qwen3MoeForCausalLM",
        {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True, "head_dim": 32},
        {"expert_count": 5, "expert_used_count": 2, "expert_feed_forward_length": 32, "attention.key_length": 32},
    ),
}  # fmt: skip
EXTRA = {
    "llama 3.1's rope": {"rope_freqs.weight": llama3_factors(8)},
    "phi3, longrope of a part": {
        "rope_factors_short.weight": torch.tensor(LONG["short_factor"]),
        "rope_factors_long.weight": torch.tensor(LONG["long_factor"]),
    },
}


def made(name: str, kinds: dict[str, int], path: Path, **more: Any) -> Any:
    """A random model of ``CASES``, written to ``path``; ``more`` keys of its tokenizer."""
    architecture, kind, config, keys = CASES[name]
    keys = {**keys, **{f"tokenizer.{key.replace('__', '.')}": value for key, value in more.items()}}
    cls = getattr(transformers, kind)
    stated = {**SIZES, **config}
    partial = stated.pop("partial_rotary_factor", None)
    if partial:
        stated["rope_parameters"] = {**stated["rope_parameters"], "partial_rotary_factor": partial}
    model = cls(cls.config_class(**stated)).eval()
    generator = torch.Generator().manual_seed(len(name))
    with torch.no_grad():
        for place, tensor in model.state_dict().items():
            if not place.endswith("inv_freq"):
                norm = place.endswith("norm.weight")
                tensor.copy_(
                    torch.randn(tensor.shape, generator=generator) * 0.1 + (norm and "gemma" not in name)
                )
        model.tie_weights()
        write_model(path, model, architecture, keys, kinds, EXTRA.get(name))
        model.tie_weights()
    return model


PROMPTS = [[5, 9, 23, 140, 77], [3], [11 + (i * 7) % 180 for i in range(37)]]


def greedy(model: Any, prompt: list[int], count: int) -> list[int]:
    ids = torch.tensor([prompt])
    for _ in range(count):
        with torch.no_grad():
            ids = torch.cat((ids, model(input_ids=ids, use_cache=False).logits[:, -1:].argmax(-1)), 1)
    return [int(token) for token in ids[0, len(prompt) :]]


@pytest.mark.parametrize("name", CASES)
def test_greedy_tokens_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    model = made(name, MIXED, tmp_path / "model.gguf")
    asked = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, detokenize=False)
    with Engine(
        tmp_path / "model.gguf", dtype="float32", skip_tokenizer_init=True, num_kv_blocks=32
    ) as engine:
        answers = engine.generate([{"prompt_token_ids": p} for p in PROMPTS], asked, progress=False)
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        assert list(answer.outputs[0].token_ids) == greedy(model, prompt, 12)


def test_a_file_of_plain_numbers_needs_no_scheme_and_can_be_quantized_on_the_fly(tmp_path: Path) -> None:
    made("llama", {"": F32}, tmp_path / "model.gguf")
    asked = SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True, detokenize=False)
    for options in ({}, {"quantization": "int8"}):
        with Engine(tmp_path, skip_tokenizer_init=True, num_kv_blocks=8, **options) as engine:
            assert engine.config.dtype == "float32"
            (answer,) = engine.generate([{"prompt_token_ids": [4, 5]}], asked, progress=False)
        assert len(answer.outputs[0].token_ids) == 3


def test_prompts_templates_and_ends_come_from_the_file(tmp_path: Path) -> None:
    letters = [chr(code) for code in range(33, 127)]
    tokens = ["<unk>", "<s>", "</s>", "<|im_end|>", "▁", *letters]
    tokens += [f"[PAD{index}]" for index in range(199 - len(tokens))]
    kinds = [2, 3, 3, 3] + [1] * (len(letters) + 1)
    made(
        "llama",
        MIXED,
        tmp_path / "model.gguf",
        ggml__model="llama",
        ggml__tokens=tokens,
        ggml__scores=[0.0] * 199,
        ggml__token_type=kinds + [5] * (199 - len(kinds)),
        ggml__bos_token_id=1,
        ggml__eos_token_id=2,
        ggml__add_bos_token=True,
        chat_template="{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}",
    )
    every_end = {2: 100.0}, {3: 100.0}
    with Engine(tmp_path / "model.gguf", dtype="float32", num_kv_blocks=8) as engine:
        for bias in every_end:
            asked = SamplingParams(temperature=0.0, max_tokens=4, logit_bias=bias)
            (answer,) = engine.generate(["hi"], asked, progress=False)
            assert answer.prompt_token_ids == [1, 4, tokens.index("h"), tokens.index("i")]
            assert answer.outputs[0].finish_reason == "stop"
        (answer,) = engine.chat([{"role": "user", "content": "a"}], asked)
    assert answer.prompt_token_ids == [4, tokens.index("a"), 2]
