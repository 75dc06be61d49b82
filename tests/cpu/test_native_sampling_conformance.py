"""The native sampling kernel passes the suite of sampling kernels."""

from __future__ import annotations

import pytest

from kvpage.testing.sampling_kernels import SamplingKernelConformance

native = pytest.importorskip("kvpage_cpu.native")
try:
    native.open_library()
except native.NativeLibraryError as error:
    pytest.skip(str(error), allow_module_level=True)

from kvpage_cpu.sampling import CpuSampling  # noqa: E402


class TestCpuSampling(SamplingKernelConformance):
    kernel = CpuSampling
