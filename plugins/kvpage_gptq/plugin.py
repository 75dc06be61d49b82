"""What is registered: one scheme, which reads both versions of the format."""

from __future__ import annotations

from kvpage import hookimpl
from kvpage.api.records import QuantizationSchemeRecord

KVPAGE_API_VERSION = "1.0"


@hookimpl
def kvpage_quantization_schemes() -> list[QuantizationSchemeRecord]:
    return [
        QuantizationSchemeRecord(
            name="gptq",
            factory="kvpage_gptq.scheme:Gptq",
            methods=("gptq", "gptq_marlin"),
            bits=4,
            summary="checkpoints of auto-gptq and gptqmodel: 2, 3, 4 and 8 bits, symmetric or not, act-order included",
        )
    ]
