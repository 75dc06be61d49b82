"""What is registered: four schemes that quantize any unquantized checkpoint, and readers of two formats."""

from __future__ import annotations

from kvpage import hookimpl
from kvpage.api.records import QuantizationSchemeRecord

KVPAGE_API_VERSION = "1.0"
OPTIONS = ("quantize_head",)
GROUPS = (128, 64, 32)
"""Inputs that share an int4 scale: the first that divides a matrix's inputs."""


@hookimpl
def kvpage_quantization_schemes() -> list[QuantizationSchemeRecord]:
    return [
        QuantizationSchemeRecord(
            name="int8",
            factory="kvpage_int8.schemes:Int8",
            bits=8,
            packs_head=True,
            options=OPTIONS,
            summary="plain weights become int8 while they load, one scale an output; activations too, a scale a token",
        ),
        QuantizationSchemeRecord(
            name="int8-weight-only",
            factory="kvpage_int8.schemes:Int8WeightOnly",
            bits=8,
            packs_head=True,
            options=OPTIONS,
            summary="the same weights, activations as they are",
        ),
        QuantizationSchemeRecord(
            name="int4",
            factory="kvpage_int8.schemes:Int4",
            bits=4,
            groups=GROUPS,
            packs_head=True,
            options=OPTIONS,
            summary="plain weights become int4 while they load, one scale for 128 inputs; activations become int8 where "
            "that is faster",
        ),
        QuantizationSchemeRecord(
            name="int4-weight-only",
            factory="kvpage_int8.schemes:Int4WeightOnly",
            bits=4,
            groups=GROUPS,
            packs_head=True,
            options=OPTIONS,
            summary="the same weights, activations as they are",
        ),
        QuantizationSchemeRecord(
            name="bitsandbytes",
            factory="kvpage_int8.bitsandbytes:BitsAndBytes",
            methods=("bitsandbytes",),
            bits=4,
            summary="checkpoints of bitsandbytes: nf4 and fp4, double quantization too, and int8 computed weight-only",
        ),
        QuantizationSchemeRecord(
            name="torchao",
            factory="kvpage_int8.torchao:TorchAO",
            methods=("torchao",),
            bits=8,
            summary="checkpoints of torchao: int8, integers of 1 to 8 bits unpacked to int8, float8 e4m3",
        ),
    ]
