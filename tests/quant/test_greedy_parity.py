"""Greedy tokens of a quantized checkpoint are transformers' with the dequantized weights, in float32, family by family.

The checkpoints are written by benchmarks/quantized_models.py from random models; what their codes stand for is
``dequantize_checkpoint``'s answer, which is held against the tools' own in test_dequantize_checkpoint.py.
"""

from __future__ import annotations

import functools
import runpy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from kvpage import Engine, SamplingParams
from kvpage.testing import dequantize_checkpoint

WRITER = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "quantized_models.py"))
PROMPTS = [[1, 5, 9, 20, 33, 70], [1, 30, 31, 32], [2, 7, 90, 91, 92, 93, 94, 95, 96, 3]]
NEW_TOKENS = 24
SIZES = {
    "vocab_size": 193, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 128,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "initializer_range": 0.1,
}  # fmt: skip
FAMILIES = {
    "LlamaForCausalLM": {},
    "Qwen2ForCausalLM": {},
    "Qwen3ForCausalLM": {"tie_word_embeddings": True},
    "Gemma2ForCausalLM": {"query_pre_attn_scalar": 64},
    "Phi3ForCausalLM": {},
    "MixtralForCausalLM": {"num_local_experts": 4, "num_experts_per_tok": 2},
}


@functools.cache
def plain_model(architecture: str, root: Path) -> tuple[Any, Path]:
    import transformers

    kind = getattr(transformers, architecture)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = kind(kind.config_class(**SIZES, **FAMILIES[architecture])).float().eval()
    folder = root / architecture
    model.save_pretrained(folder)
    return model, folder


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("parity")


def expected_tokens(model: Any, values: dict[str, torch.Tensor]) -> list[list[int]]:
    """transformers' greedy tokens with ``values`` in place of the weights of those names."""
    kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert set(values) <= set(kept)
    model.load_state_dict({**kept, **values})
    try:
        found = []
        for prompt in PROMPTS:
            ids = torch.tensor([prompt])
            with torch.inference_mode():
                out = model.generate(
                    ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS,
                    min_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0, eos_token_id=None,
                )  # fmt: skip
            found.append(out[0, len(prompt) :].tolist())
        return found
    finally:
        model.load_state_dict(kept)


def kvpage_tokens(path: Path, decoder: str) -> list[list[int]]:
    asked = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, ignore_eos=True, detokenize=False)
    with Engine(
        path, dtype="float32", decoder_backend=decoder, skip_tokenizer_init=True, num_kv_blocks=64
    ) as engine:
        outputs = engine.generate([{"prompt_token_ids": p} for p in PROMPTS], asked, progress=False)
        return [list(output.outputs[0].token_ids) for output in outputs]


def taken_apart_phi3(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """gate_up_proj as two matrices, as gptqmodel quantizes it."""
    found = {}
    for name, tensor in tensors.items():
        if name.endswith("gate_up_proj.weight"):
            halves = tensor.chunk(2)
            found |= {
                name.replace("gate_up", part): half for part, half in zip(("gate", "up"), halves, strict=True)
            }
        else:
            found[name] = tensor
    return found


def renamed_mixtral(tensors: dict[str, torch.Tensor], block: str) -> dict[str, torch.Tensor]:
    """Experts and router under the names of other families, in ``block``."""
    parts = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
    found = {}
    for name, tensor in tensors.items():
        head, _, part = name.removesuffix(".weight").rpartition(".")
        new = f"{head}.{parts[part]}.weight" if part in parts else name
        found[new.replace("block_sparse_moe", block)] = tensor
    return found


TAKEN_APART: dict[str, tuple[str, Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]]] = {
    "gptqmodel-phi3": ("Phi3ForCausalLM", taken_apart_phi3),
    "gptqmodel-mixtral": ("MixtralForCausalLM", functools.partial(renamed_mixtral, block="mlp")),
    "llmcompressor-mixtral": ("MixtralForCausalLM", functools.partial(renamed_mixtral, block="block_sparse_moe")),
}  # fmt: skip


@pytest.mark.parametrize("name", TAKEN_APART)
def test_modules_that_a_quantizer_takes_apart_or_renames_are_found(name: str, root: Path) -> None:
    architecture, change = TAKEN_APART[name]
    model, folder = plain_model(architecture, root)
    changed = root / name
    changed.mkdir()
    shutil.copy(folder / "config.json", changed)
    tensors = change(dict(WRITER["plain_tensors"](folder)))
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, changed / "model.safetensors")
    path = WRITER["make"](changed, root / "quantized", "gptq-g128")
    written = load_file(path / "model.safetensors")
    assert sum(key.endswith(".qweight") for key in written) >= 2 * 5
    values = dict(dequantize_checkpoint(path))
    assert {key for key in tensors if tensors[key].dim() == 2} == set(values)
    inner = SIZES["intermediate_size"]
    for layer in range(2):
        prefix = f"model.layers.{layer}"
        if architecture == "Phi3ForCausalLM":
            halves = [values.pop(f"{prefix}.mlp.{part}_proj.weight") for part in ("gate", "up")]
            values[f"{prefix}.mlp.gate_up_proj.weight"] = torch.cat(halves)
            continue
        old = f"{prefix}.{'mlp' if 'gptqmodel' in name else 'block_sparse_moe'}"
        values[f"{prefix}.mlp.gate.weight"] = values.pop(f"{old}.gate.weight")
        expert = {
            part: torch.stack([values.pop(f"{old}.experts.{index}.{part}_proj.weight") for index in range(4)])
            for part in ("gate", "up", "down")
        }
        values[f"{prefix}.mlp.experts.gate_up_proj"] = torch.cat([expert["gate"], expert["up"]], 1)
        values[f"{prefix}.mlp.experts.down_proj"] = expert["down"]
        assert values[f"{prefix}.mlp.experts.gate_up_proj"].shape[1] == 2 * inner
    expected = expected_tokens(model, values)
    assert kvpage_tokens(path, "torch") == expected
    assert kvpage_tokens(path, "cpu") == expected


CASES = [
    *((architecture, name) for architecture in FAMILIES if architecture != "MixtralForCausalLM" for name in ("gptq-g128", "gptq-g32-act-order", "nf4")),
    *(("LlamaForCausalLM", name) for name in ("awq-g128", "w4a16-g32", "fp8", "q4_0", "q4_k", "q8_0")),
    ("Qwen3ForCausalLM", "fp8"),
    ("Gemma2ForCausalLM", "awq-g128"),
]  # fmt: skip


@pytest.mark.parametrize(("architecture", "name"), CASES)
def test_greedy_tokens_are_those_of_the_dequantized_weights(architecture: str, name: str, root: Path) -> None:
    model, folder = plain_model(architecture, root)
    path = WRITER["make"](folder, root / "quantized", name)
    values = {key: tensor for key, tensor in dequantize_checkpoint(path) if key in model.state_dict()}
    packed = [key for key in values if not torch.equal(values[key], model.state_dict()[key])]
    assert len(packed) >= 2 * 4, "the checkpoint quantizes the layers' matrices"
    expected = expected_tokens(model, values)
    assert kvpage_tokens(path, "torch") == expected
    assert kvpage_tokens(path, "cpu") == expected
