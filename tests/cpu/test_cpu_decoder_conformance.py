"""The native decoder passes the suite of decoder backends with each instruction set that this processor has."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from kvpage.testing.decoder_backends import DecoderBackendConformance
from kvpage.testing.decoder_models import sample_specs
from kvpage_cpu.attention import CpuAttention
from kvpage_cpu.decoder import CpuDecoder
from kvpage_cpu.native import ISA_VARIABLE, ISAS, available_isas, library_path


class CpuDecoderSuite(DecoderBackendConformance):
    decoder = CpuDecoder
    attention_backend = CpuAttention
    must_build = tuple(sample_specs(8))
    isa = ISAS[0]
    threads = 1

    @pytest.fixture(autouse=True)
    def _forced(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        if self.isa not in available_isas():
            pytest.skip(f"this processor has no {self.isa}")
        monkeypatch.setenv(ISA_VARIABLE, self.isa)
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        yield
        torch.set_num_threads(before)


class TestPortable(CpuDecoderSuite):
    isa = "portable"


class TestAvx2(CpuDecoderSuite):
    isa = "avx2"


class TestAvx512(CpuDecoderSuite):
    isa = "avx512"


class TestAvx512Bf16(CpuDecoderSuite):
    isa = "avx512_bf16"


class TestThreeThreads(CpuDecoderSuite):
    """More than there may be cores: whoever does not wait for the others is found out."""

    isa = available_isas()[-1] if library_path().exists() else ISAS[0]
    dtypes = ("float32",)
    threads = 3


del DecoderBackendConformance, CpuDecoderSuite
