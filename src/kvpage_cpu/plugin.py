"""What the native CPU backend registers."""

from __future__ import annotations

from kvpage import hookimpl
from kvpage.api.records import (
    AttentionBackendRecord,
    DecoderBackendRecord,
    LinearKernelRecord,
    SamplingKernelRecord,
)


@hookimpl
def kvpage_attention_backends() -> list[AttentionBackendRecord]:
    return [
        AttentionBackendRecord(
            name="cpu",
            factory="kvpage_cpu.attention:CpuAttention",
            summary="native kernels for x86-64, chosen by the processor",
            describe="kvpage_cpu.native:describe",
        )
    ]


@hookimpl
def kvpage_decoder_backends() -> list[DecoderBackendRecord]:
    return [
        DecoderBackendRecord(
            name="cpu",
            factory="kvpage_cpu.decoder:CpuDecoder",
            summary="all layers in one native call, over attention backend cpu",
            describe="kvpage_cpu.native:describe",
        )
    ]


@hookimpl
def kvpage_linear_kernels() -> list[LinearKernelRecord]:
    return [
        LinearKernelRecord(
            name="cpu",
            factory="kvpage_cpu.linear:CpuLinear",
            summary="native products of packed weights, decoded in registers",
            describe="kvpage_cpu.native:describe",
        )
    ]


@hookimpl
def kvpage_sampling_kernels() -> list[SamplingKernelRecord]:
    return [
        SamplingKernelRecord(
            name="cpu",
            factory="kvpage_cpu.sampling:CpuSampling",
            devices=("cpu",),
            summary="native argmax and draws, without sorting",
            describe="kvpage_cpu.native:describe",
        )
    ]
