"""Every family gives transformers' logits, on tiny random checkpoints with odd configurations."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from dense_context import all_logits, decoder_from

from kvpage.api.model import DecoderEnv, ModelDefinition
from kvpage.loading.memory import Arena
from kvpage.loading.readers import ModuleView
from kvpage.loading.weights import load_weights
from kvpage.models.decoder import Decoder
from kvpage.models.families import llama, mistral, qwen2, qwen3
from kvpage.models.hf_config import HFConfig

transformers = pytest.importorskip("transformers")

BASE: dict[str, Any] = {
    "vocab_size": 211,
    "hidden_size": 48,
    "intermediate_size": 72,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
SLIDING = ["full_attention", "sliding_attention", "full_attention"]

CASES: list[tuple[str, str, Callable[..., ModelDefinition], dict[str, Any]]] = [
    ("llama", "Llama", llama.translate, {}),
    ("llama-biases", "Llama", llama.translate, {"attention_bias": True, "mlp_bias": True}),
    ("llama-tied-mqa", "Llama", llama.translate, {"tie_word_embeddings": True, "num_key_value_heads": 1}),
    ("llama-mha-wide-heads", "Llama", llama.translate, {"num_key_value_heads": 4, "head_dim": 20}),
    ("llama-gelu-eps", "Llama", llama.translate, {"hidden_act": "gelu", "rms_norm_eps": 1e-2}),
    ("llama-linear", "Llama", llama.translate, {"rope_scaling": {"type": "linear", "factor": 3.0}}),
    ("llama3-rope", "Llama", llama.translate, {"rope_parameters": {**LLAMA3, "rope_theta": 5e5}}),
    ("llama-yarn", "Llama", llama.translate, {"rope_parameters": {**YARN, "rope_theta": 1e4}}),
    ("llama-dynamic", "Llama", llama.translate, {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}),
    ("mistral-window", "Mistral", mistral.translate, {"sliding_window": 7}),
    ("mistral-full", "Mistral", mistral.translate, {"sliding_window": None, "head_dim": 16}),
    ("qwen2", "Qwen2", qwen2.translate, {}),
    ("qwen2-tied", "Qwen2", qwen2.translate, {"tie_word_embeddings": True}),
    (
        "qwen2-upper-windows",
        "Qwen2",
        qwen2.translate,
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
    (
        "qwen2-layer-types",
        "Qwen2",
        qwen2.translate,
        {"use_sliding_window": True, "sliding_window": 5, "layer_types": SLIDING},
    ),
    ("qwen3", "Qwen3", qwen3.translate, {"head_dim": 16}),
    (
        "qwen3-biases-tied",
        "Qwen3",
        qwen3.translate,
        {"head_dim": 24, "attention_bias": True, "tie_word_embeddings": True},
    ),
    (
        "qwen3-windows",
        "Qwen3",
        qwen3.translate,
        {"head_dim": 16, "use_sliding_window": True, "sliding_window": 9, "max_window_layers": 2},
    ),
]


def make_model(kind: str, options: dict[str, Any], *, head: str = "ForCausalLM", seed: int = 0) -> Any:
    """A random transformers model; biases and norms are random too, so that none can be forgotten."""
    model_class = getattr(transformers, f"{kind}{head}")
    config = model_class.config_class(**{**BASE, **options})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config).eval()
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name or ".ln_" in name:
                torch.nn.init.normal_(parameter, mean=0.0 if name.endswith("bias") else 1.0, std=0.3)
    return model


@torch.inference_mode()
def oracle_logits(model: Any, token_ids: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = model(token_ids[None]).logits[0]
    return logits


def prompt(length: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, BASE["vocab_size"], (length,), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("kind", "translate", "options"), [case[1:] for case in CASES], ids=[case[0] for case in CASES]
)
def test_logits_equal_transformers(
    tmp_path: Path, kind: str, translate: Callable[..., ModelDefinition], options: dict[str, Any]
) -> None:
    model = make_model(kind, options)
    model.save_pretrained(tmp_path)
    definition = translate(HFConfig.from_folder(tmp_path), max_model_len=None)
    tokens = prompt(40)
    torch.testing.assert_close(
        all_logits(decoder_from(tmp_path, definition), tokens),
        oracle_logits(model, tokens),
        atol=1e-4,
        rtol=1e-4,
    )


@pytest.mark.parametrize(("kind", "translate", "options"), [CASES[1][1:], CASES[6][1:], CASES[16][1:]])
def test_a_living_model_gives_its_own_logits(
    kind: str, translate: Callable[..., ModelDefinition], options: dict[str, Any]
) -> None:
    model = make_model(kind, options)
    definition = translate(HFConfig.from_object(model.config), max_model_len=None)
    loaded = load_weights(definition, ModuleView(model), dtype=torch.float32, device="cpu", arena=Arena())
    decoder = Decoder(definition.spec, loaded.weights, DecoderEnv(device="cpu", dtype="float32"))
    tokens = prompt(40)
    torch.testing.assert_close(
        all_logits(decoder, tokens), oracle_logits(model, tokens), atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_close_to_transformers_own(tmp_path: Path, dtype: torch.dtype) -> None:
    model = make_model("Llama", {"initializer_range": 0.05})
    model.save_pretrained(tmp_path)
    exact = oracle_logits(model, prompt(40))
    definition = llama.translate(HFConfig.from_folder(tmp_path), max_model_len=None)
    ours = (all_logits(decoder_from(tmp_path, definition, dtype), prompt(40)).float() - exact).abs().mean()
    theirs = (oracle_logits(model.to(dtype), prompt(40)).float() - exact).abs().mean()
    assert ours <= 1.25 * theirs
