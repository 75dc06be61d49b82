"""What is registered: one scheme, which reads the formats that compressed-tensors writes."""

from __future__ import annotations

from kvpage import hookimpl
from kvpage.api.records import QuantizationSchemeRecord

KVPAGE_API_VERSION = "1.0"


@hookimpl
def kvpage_quantization_schemes() -> list[QuantizationSchemeRecord]:
    return [
        QuantizationSchemeRecord(
            name="compressed-tensors",
            factory="kvpage_compressed.scheme:CompressedTensors",
            methods=("compressed-tensors", "compressed_tensors"),
            bits=4,
            summary="pack-quantized (2 to 8 bits), int-quantized (W8A8) and float-quantized (fp8) checkpoints of "
            "llm-compressor",
        )
    ]
