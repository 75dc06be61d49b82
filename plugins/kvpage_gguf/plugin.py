"""What is registered: the reader of .gguf files, and the scheme that reads their blocks."""

from __future__ import annotations

from kvpage import hookimpl
from kvpage.api.records import CheckpointReaderRecord, QuantizationSchemeRecord

KVPAGE_API_VERSION = "1.0"


@hookimpl
def kvpage_checkpoint_readers() -> list[CheckpointReaderRecord]:
    return [
        CheckpointReaderRecord(
            name="gguf",
            factory="kvpage_gguf.reader:GGUFReader",
            files=("*.gguf",),
            summary="one .gguf file: weights, config and tokenizer from its metadata",
        )
    ]


@hookimpl
def kvpage_quantization_schemes() -> list[QuantizationSchemeRecord]:
    return [
        QuantizationSchemeRecord(
            name="gguf",
            factory="kvpage_gguf.types:GGUFScheme",
            methods=("gguf",),
            bits=4.5,
            summary="GGUF's blocks: Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K to Q6_K, IQ4_NL, IQ4_XS",
        )
    ]
