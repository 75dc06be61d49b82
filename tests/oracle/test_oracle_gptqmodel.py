"""gptqmodel, which transformers reads GPTQ checkpoints with, and ``kvpage quantize``: each loads what the other writes."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from kvpage.testing import dequantize_checkpoint
from kvpage_quantize.command import run
from tiny_checkpoint import write_checkpoint

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(600)]
TOKENS = torch.tensor([[1, 40, 77, 123, 9, 200, 31]])


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
    return write_checkpoint(tmp_path_factory.mktemp("plain") / "model", seed=5, **sizes)


def dequantized_model(plain: Path, folder: Path) -> Any:
    model = transformers.AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32).eval()
    state = dict(dequantize_checkpoint(folder))
    model.load_state_dict(state, strict=False)
    return model


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.float() - expected).norm() / expected.norm())


@pytest.mark.parametrize("flags", [[], ["--desc-act", "--no-sym"]], ids=["symmetric", "asymmetric act-order"])
def test_transformers_loads_what_is_written_here(flags: list[str], plain: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    few = ["--calibration-samples", "8", "--sequence-length", "64", "--group-size", "32"]
    assert run([str(plain), "--method", "gptq", "--out", out, *few, *flags]) == 0
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        out, dtype=torch.float32, device_map="cpu"
    ).eval()
    with torch.no_grad():
        assert (
            relative(theirs(TOKENS).logits, dequantized_model(plain, tmp_path / "out")(TOKENS).logits) < 0.02
        )


@pytest.mark.parametrize("layout", ["gptq", "gptq_v2"])
def test_what_gptqmodel_writes_is_loaded_here(layout: str, plain: Path, tmp_path: Path) -> None:
    package = importlib.import_module("gptqmodel")
    config = package.QuantizeConfig(bits=4, group_size=32, desc_act=False, format=layout)
    model = package.GPTQModel.load(str(plain), config)
    generator = torch.Generator().manual_seed(7)
    rows = [torch.randint(3, 300, (64,), generator=generator).tolist() for _ in range(32)]
    model.quantize([{"input_ids": row, "attention_mask": [1] * 64} for row in rows], batch_size=1)
    model.save(str(tmp_path / "theirs"))
    before = load_file(plain / "model.safetensors")
    found = dict(dequantize_checkpoint(tmp_path / "theirs"))
    rounded = [name for name in found if not found[name].equal(before[name]) and "layers" in name]
    assert len(rounded) == 14
    for name in rounded:
        assert relative(found[name], before[name]) < 0.2, name
