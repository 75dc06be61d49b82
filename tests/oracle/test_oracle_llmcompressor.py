"""int8 and fp8 of ``kvpage quantize`` beside llmcompressor's own, and through transformers' loader of the format."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from kvpage.testing import dequantize_checkpoint
from kvpage_quantize.command import run
from tiny_checkpoint import write_checkpoint

METHODS = ("int8", "fp8")
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
    return write_checkpoint(tmp_path_factory.mktemp("plain") / "model", seed=5, **sizes)


@pytest.fixture(scope="module")
def ours(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("ours")
    for method in METHODS:
        assert run([str(plain), "--method", method, "--out", str(root / method)]) == 0
    return {method: root / method for method in METHODS}


def recipe(method: str) -> Any:
    modifier = importlib.import_module("llmcompressor.modifiers.quantization").QuantizationModifier
    if method == "fp8":
        return modifier(targets="Linear", scheme="FP8_DYNAMIC", ignore=["lm_head"])
    quantization = importlib.import_module("compressed_tensors.quantization")
    numbers = {"num_bits": 8, "type": "int", "symmetric": True}
    scheme = quantization.QuantizationScheme(
        targets=["Linear"],
        weights=quantization.QuantizationArgs(**numbers, strategy="channel"),
        input_activations=quantization.QuantizationArgs(**numbers, strategy="token", dynamic=True),
    )
    return modifier(config_groups={"group_0": scheme}, ignore=["lm_head"])


@pytest.mark.parametrize("method", METHODS)
def test_llmcompressor_writes_the_same_tensors(
    method: str, plain: Path, ours: dict[str, Path], tmp_path: Path
) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32)
    importlib.import_module("llmcompressor").oneshot(model=model, recipe=recipe(method))
    model.save_pretrained(tmp_path / "theirs", save_compressed=True)
    theirs = load_file(tmp_path / "theirs" / "model.safetensors")
    found = load_file(ours[method] / "model.safetensors")
    assert found.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert found[name].dtype == tensor.dtype, name
        torch.testing.assert_close(found[name].float(), tensor.float(), rtol=1e-6, atol=0, msg=name)
    stated = json.loads((tmp_path / "theirs" / "config.json").read_text())["quantization_config"]
    written = json.loads((ours[method] / "config.json").read_text())["quantization_config"]
    assert {**stated, "version": written["version"]} == written


@pytest.mark.parametrize("method", METHODS)
def test_transformers_loads_the_same_weights(method: str, ours: dict[str, Path]) -> None:
    theirs = transformers.AutoModelForCausalLM.from_pretrained(ours[method], dtype=torch.float32).eval()
    with torch.no_grad():
        theirs(torch.tensor([[1, 40, 77, 123, 9, 200, 31]]))  # it decompresses at the first forward
    found = theirs.state_dict()
    for name, weight in dequantize_checkpoint(ours[method]):
        torch.testing.assert_close(found[name].float(), weight, rtol=1e-6, atol=0, msg=name)
