"""What is registered: one scheme, which reads the "fp8" and "fbgemm_fp8" checkpoints."""

from __future__ import annotations

from kvpage import hookimpl
from kvpage.api.records import QuantizationSchemeRecord

KVPAGE_API_VERSION = "1.0"


@hookimpl
def kvpage_quantization_schemes() -> list[QuantizationSchemeRecord]:
    return [
        QuantizationSchemeRecord(
            name="fp8",
            factory="kvpage_fp8.scheme:Fp8Checkpoint",
            methods=("fp8", "fbgemm_fp8"),
            bits=8,
            summary="8-bit floats (E4M3) with a scale a tensor, an output or a block; activations stay as they are",
        )
    ]
