"""What is registered: one scheme, which reads every layout of the format."""

from __future__ import annotations

from kvpage import hookimpl
from kvpage.api.records import QuantizationSchemeRecord

KVPAGE_API_VERSION = "1.0"


@hookimpl
def kvpage_quantization_schemes() -> list[QuantizationSchemeRecord]:
    return [
        QuantizationSchemeRecord(
            name="awq",
            factory="kvpage_awq.scheme:Awq",
            methods=("awq", "awq_marlin"),
            bits=4,
            summary="checkpoints of AutoAWQ and llm-awq: 4 bits in the layouts GEMM, GEMV and GEMV-fast",
        )
    ]
