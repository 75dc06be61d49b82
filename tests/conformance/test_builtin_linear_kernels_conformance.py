"""kvpage's own linear kernels pass the suite of linear kernels."""

from __future__ import annotations

from kvpage.nn.linear import DenseLinear
from kvpage.nn.quantized_linear import DequantizeLinear, Int8Linear
from kvpage.testing.linear_kernels import LinearKernelConformance


class TestDenseLinear(LinearKernelConformance):
    kernel = DenseLinear


class TestInt8Linear(LinearKernelConformance):
    kernel = Int8Linear


class TestDequantizeLinear(LinearKernelConformance):
    kernel = DequantizeLinear
    dtypes = ("float32", "bfloat16")
