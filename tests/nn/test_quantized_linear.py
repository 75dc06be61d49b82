"""Kernels of quantized weights: how they are chosen, what they keep in memory. Their values: tests/conformance."""

from __future__ import annotations

import pytest
import torch

from kvpage.api.model import DecoderEnv
from kvpage.api.quant import ChannelInt8, Dense
from kvpage.nn.linear import DenseLinear, build_fused, make_kernel
from kvpage.nn.quantized_linear import DequantizeLinear, Int8Linear

KERNELS = (Int8Linear, DequantizeLinear)


def env(dtype: str = "float32") -> DecoderEnv:
    return DecoderEnv(device="cpu", dtype=dtype, linear_kernels=KERNELS)


def form(outputs: int, inputs: int, seed: int = 0) -> ChannelInt8:
    generator = torch.Generator().manual_seed(seed)
    return ChannelInt8(
        codes=torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8, generator=generator),
        scales=torch.rand(outputs, generator=generator) * 0.01,
    )


def test_plain_weights_are_computed_where_they_lie() -> None:
    weight = torch.randn(6, 4)
    kernel = make_kernel(Dense(weight), None, env())
    assert type(kernel) is DenseLinear
    weight.zero_()
    assert not kernel.forward(torch.ones(2, 4)).any()


def test_int8_weights_are_computed_from_their_codes() -> None:
    weight = form(6, 4)
    kernel = make_kernel(weight, None, env())
    assert isinstance(kernel, Int8Linear)
    weight.codes.zero_()
    assert not kernel.forward(torch.ones(2, 4)).any()


def test_a_dtype_without_a_kernel_of_its_own_is_dequantized() -> None:
    assert type(make_kernel(form(6, 4), None, env("float64"))) is DequantizeLinear


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@torch.inference_mode()
def test_parts_of_one_tensor_are_one_product(dtype: str) -> None:
    whole = form(12, 8)
    rows = torch.arange(12).split([4, 2, 6])
    parts = [whole.map(lambda t, r=part: t[r[0] : r[-1] + 1]) for part in rows]
    weights = {f"{name}.weight": part for name, part in zip("qkv", parts, strict=True)}
    fused = build_fused(weights, list("qkv"), env(dtype))
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(1)).to(getattr(torch, dtype))
    outputs = fused(x)
    assert len({part.untyped_storage().data_ptr() for part in outputs}) == 1
    for name, output in zip("qkv", outputs, strict=True):
        assert torch.equal(output, make_kernel(weights[f"{name}.weight"], None, env(dtype)).forward(x))


@torch.inference_mode()
def test_sums_beyond_the_range_of_float16_are_scaled_before_they_are_formed() -> None:
    weight = ChannelInt8(codes=torch.full((2, 2048), 127, dtype=torch.int8), scales=torch.full((2,), 1e-3))
    out = make_kernel(weight, None, env("float16")).forward(torch.ones(3, 2048, dtype=torch.float16))
    assert torch.allclose(out.float(), torch.full((3, 2), 0.127 * 2048), rtol=2e-3)
