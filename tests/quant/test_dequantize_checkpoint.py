"""kvpage.testing.dequantize_checkpoint: the matrices of real tools' checkpoints bit for bit, under transformers' names."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import kvpage.testing
from kvpage import CheckpointError, PluginRegistry
from kvpage.testing import dequantize_checkpoint
from kvpage_int8.plugin import kvpage_quantization_schemes
from tiny_checkpoint import write_checkpoint

VECTORS = Path(__file__).parents[1] / "data" / "quant"
EXACT = sorted(
    path.parent.name
    for path in VECTORS.glob("*/oracle.json")
    if not path.parent.name.startswith("awq-gemvfast")
)


def checkpoint(name: str) -> Path:
    """The folder of a vector, or its one .gguf file."""
    return next((VECTORS / name).glob("*.gguf"), VECTORS / name)


@pytest.mark.parametrize("name", EXACT)
def test_every_matrix_is_its_tools_own_bit_for_bit(name: str) -> None:
    expected: dict[str, str] = json.loads((VECTORS / name / "oracle.json").read_text())
    found: dict[str, str] = {}
    for matrix, weight in dequantize_checkpoint(checkpoint(name)):
        assert weight.dtype == torch.float32
        assert weight.dim() == 2
        assert matrix not in found
        found[matrix] = hashlib.sha256(weight.contiguous().numpy().tobytes()).hexdigest()
    norms = {key for key in expected if key.endswith("norm.weight")}
    assert {key: found.get(key) for key in expected.keys() - norms} == {
        key: expected[key] for key in expected.keys() - norms
    }


def test_zeros_stored_as_float16_are_within_their_rounding() -> None:
    folder = VECTORS / "awq-gemvfast-g128-layer"
    found = dict(dequantize_checkpoint(folder))
    with np.load(folder / "oracle.npz") as oracle:
        expected = {name[2:]: oracle[name] for name in oracle.files if name.startswith("w:")}
    assert found.keys() == expected.keys()
    for name, weight in found.items():
        np.testing.assert_allclose(weight.numpy(), expected[name], atol=1e-3, rtol=0, err_msg=name)


FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {}),
    "tied": ("Qwen2ForCausalLM", {"tie_word_embeddings": True}),
    "one tensor for q, k, v": ("Phi3ForCausalLM", {"pad_token_id": 0}),
    "q, k, v of each head together": ("GPTNeoXForCausalLM", {}),
    "stored [in, out]": ("GPT2LMHeadModel", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "experts": ("MixtralForCausalLM", {"num_local_experts": 4, "num_experts_per_tok": 2}),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_plain_matrices_have_the_names_and_values_of_the_file(family: str, tmp_path: Path) -> None:
    architecture, more = FAMILIES[family]
    kind = getattr(transformers, architecture)
    sizes = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "tie_word_embeddings": False,
    }  # fmt: skip
    kind(kind.config_class(**{**sizes, **more})).save_pretrained(tmp_path)
    stored = {
        name: tensor
        for name, tensor in load_file(tmp_path / "model.safetensors").items()
        if tensor.dim() == 2
    }
    found = dict(dequantize_checkpoint(tmp_path))
    assert found.keys() == stored.keys()
    turned = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    for name, weight in found.items():
        tensor = stored[name]
        assert torch.equal(weight, tensor.t() if name.endswith(turned) else tensor), name


def test_experts_of_one_tensor_have_the_names_of_single_ones(tmp_path: Path) -> None:
    kind = transformers.MixtralForCausalLM
    config = kind.config_class(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4,
    )  # fmt: skip
    kind(config).save_pretrained(tmp_path)
    single = {name: weight.clone() for name, weight in dequantize_checkpoint(tmp_path) if ".experts." in name}
    kind.from_pretrained(tmp_path).save_pretrained(tmp_path / "together", save_original_format=False)
    stored = load_file(tmp_path / "together" / "model.safetensors")
    assert any(tensor.dim() == 3 for tensor in stored.values())
    together = {
        name: weight for name, weight in dequantize_checkpoint(tmp_path / "together") if ".experts." in name
    }
    assert len(single) == 12
    assert together.keys() == single.keys()
    assert all(torch.equal(together[name], single[name]) for name in single)


def test_a_checkpoint_of_the_bare_model_has_the_names_of_the_whole(tmp_path: Path) -> None:
    whole = dict(dequantize_checkpoint(write_checkpoint(tmp_path, tokenizer=False)))
    tensors = load_file(tmp_path / "model.safetensors")
    bare = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    save_file(bare, tmp_path / "model.safetensors")
    found = dict(dequantize_checkpoint(tmp_path))
    assert list(found) == list(whole)
    assert all(torch.equal(found[name], whole[name]) for name in whole)


def test_a_head_that_the_files_hold_is_given_though_the_config_ties_it(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, tokenizer=False, tie_word_embeddings=True)
    tensors = load_file(tmp_path / "model.safetensors")
    head = tensors.pop("lm_head.weight")
    assert torch.equal(dict(dequantize_checkpoint(tmp_path))["lm_head.weight"], head)
    save_file(tensors, tmp_path / "model.safetensors")
    assert "lm_head.weight" not in dict(dequantize_checkpoint(tmp_path))


def test_what_the_files_lack_is_skipped(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, tokenizer=False)
    kept = "model.layers.1.mlp.up_proj.weight"
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({kept: tensors[kept]}, tmp_path / "model.safetensors")
    assert [name for name, _ in dequantize_checkpoint(tmp_path)] == [kept]


def test_matrices_are_new_tensors(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, tokenizer=False)
    for _, weight in dequantize_checkpoint(tmp_path):
        weight.zero_()
    assert all(bool(weight.any()) for _, weight in dequantize_checkpoint(tmp_path))


def test_a_plain_matrix_of_another_shape_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, tokenizer=False)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.self_attn.k_proj.weight"
    save_file({**tensors, name: tensors[name][:-1].clone()}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"{name}.*\[16, 32\].*\[15, 32\]"):
        list(dequantize_checkpoint(tmp_path))


def test_a_quantized_checkpoint_whose_config_lacks_that_is_refused(tmp_path: Path) -> None:
    folder = shutil.copytree(VECTORS / "torchao-int8wo-layer", tmp_path / "copy")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = None
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"k_proj\.weight' is missing.*quantization_config"):
        list(dequantize_checkpoint(folder))


def test_damage_is_the_schemes_own_error_with_the_file(tmp_path: Path) -> None:
    folder = shutil.copytree(VECTORS / "bnb-nf4-layer", tmp_path / "copy")
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.down_proj.weight.absmax"
    save_file({**tensors, name: tensors[name][:-1].clone()}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.safetensors.*down_proj\.weight\.absmax.*512.*511"):
        list(dequantize_checkpoint(folder))


class _OnlyInt8:
    """A plugin that registers what kvpage_int8 does."""

    KVPAGE_API_VERSION = "1.0"
    kvpage_quantization_schemes = staticmethod(kvpage_quantization_schemes)


def test_formats_are_those_of_the_given_plugins() -> None:
    given = PluginRegistry([_OnlyInt8()], entry_points=False)
    assert len(list(dequantize_checkpoint(VECTORS / "bnb-nf4-layer", given))) == 2
    none = PluginRegistry(entry_points=False)
    with pytest.raises(CheckpointError, match="bitsandbytes"):
        list(dequantize_checkpoint(VECTORS / "bnb-nf4-layer", none))


def test_no_quantization_library_is_loaded_and_kvpage_testing_stays_light() -> None:
    heavy = ("torch", "pytest", "bitsandbytes", "torchao", "auto_gptq", "awq", "gguf", "compressed_tensors")
    program = f"""
import sys
import kvpage.testing
print([name for name in {heavy!r} if name in sys.modules])
from kvpage.testing import dequantize_checkpoint
for _ in dequantize_checkpoint({str(VECTORS / "bnb-nf4-layer")!r}):
    pass
print([name for name in {heavy!r} if name in sys.modules])
"""
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60
    )
    assert run.stdout.splitlines() == ["[]", "['torch']"]


def test_other_names_are_not_there() -> None:
    with pytest.raises(AttributeError, match="quantize_checkpoint"):
        kvpage.testing.quantize_checkpoint  # noqa: B018
