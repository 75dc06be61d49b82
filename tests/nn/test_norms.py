"""Norms round exactly as transformers rounds them."""

from __future__ import annotations

import pytest
import torch

from kvpage.api.model import NormSpec
from kvpage.api.quant import Dense
from kvpage.nn.norm import build_norm

modeling = pytest.importorskip("transformers.models.llama.modeling_llama")
gemma = pytest.importorskip("transformers.models.gemma2.modeling_gemma2")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def random(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 3).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [8, 100, 768])
@torch.inference_mode()
def test_rms_equals_llamas_to_the_bit(dtype: torch.dtype, size: int) -> None:
    oracle = modeling.LlamaRMSNorm(size, eps=1e-5).to(dtype)
    oracle.weight.copy_(random(size, dtype=dtype, seed=1))
    norm = build_norm(NormSpec(kind="rms", eps=1e-5), {"n.weight": Dense(oracle.weight)}, "n")
    x = random(5, size, dtype=dtype)
    assert torch.equal(norm(x), oracle(x))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@torch.inference_mode()
def test_rms_one_plus_equals_gemmas_to_the_bit(dtype: torch.dtype) -> None:
    oracle = gemma.Gemma2RMSNorm(96, eps=1e-6).to(dtype)
    oracle.weight.copy_(random(96, dtype=dtype, seed=1))
    norm = build_norm(NormSpec(kind="rms1p", eps=1e-6), {"n.weight": Dense(oracle.weight)}, "n")
    x = random(5, 96, dtype=dtype)
    assert torch.equal(norm(x), oracle(x))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [True, False])
@torch.inference_mode()
def test_layer_norm_equals_torchs(dtype: torch.dtype, bias: bool) -> None:
    oracle = torch.nn.LayerNorm(96, eps=1e-5, bias=bias, dtype=dtype)
    oracle.weight.copy_(random(96, dtype=dtype, seed=1))
    weights = {"n.weight": Dense(oracle.weight)}
    if bias:
        oracle.bias.copy_(random(96, dtype=dtype, seed=2))
        weights["n.bias"] = Dense(oracle.bias)
    norm = build_norm(NormSpec(kind="layer", eps=1e-5, bias=bias), weights, "n")
    x = random(5, 96, dtype=dtype)
    assert torch.equal(norm(x), oracle(x))


def test_the_input_is_left_alone() -> None:
    for kind in ("rms", "rms1p", "layer"):
        norm = build_norm(NormSpec(kind=kind, eps=1e-6), {"n.weight": Dense(torch.ones(16))}, "n")
        x = random(4, 16, dtype=torch.float32)
        before = x.clone()
        norm(x)
        assert torch.equal(x, before)


def test_an_rms_norm_with_a_bias_is_refused() -> None:
    weights = {"n.weight": Dense(torch.ones(8)), "n.bias": Dense(torch.zeros(8))}
    with pytest.raises(ValueError, match="has no bias"):
        build_norm(NormSpec(kind="rms", eps=1e-6, bias=True), weights, "n")
