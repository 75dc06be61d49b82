"""The native attention backend keeps the contract, on every instruction set that this processor has."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import pytest

from kvpage.testing.attention import AttentionBackendConformance
from kvpage_cpu.attention import CpuAttention
from kvpage_cpu.native import ISA_VARIABLE, available_isas


class OnOneInstructionSet(AttentionBackendConformance):
    backend = CpuAttention
    isa: ClassVar[str]

    @pytest.fixture(autouse=True, scope="class")
    @classmethod
    def instruction_set(cls) -> Iterator[None]:
        if cls.isa not in available_isas():
            pytest.skip(f"this processor has no {cls.isa}")
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(ISA_VARIABLE, cls.isa)
            yield


class TestPortable(OnOneInstructionSet):
    isa = "portable"


class TestAvx2(OnOneInstructionSet):
    isa = "avx2"


class TestAvx512(OnOneInstructionSet):
    isa = "avx512"


class TestAvx512Bf16(OnOneInstructionSet):
    isa = "avx512_bf16"
