"""The native linear kernel passes the suite of linear kernels."""

from __future__ import annotations

from kvpage.testing.linear_kernels import LinearKernelConformance
from kvpage_cpu.linear import CpuLinear


class TestCpuLinear(LinearKernelConformance):
    kernel = CpuLinear
    dtypes = ("float32", "bfloat16")


del LinearKernelConformance
