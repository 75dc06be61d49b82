"""The plugin that ships with kvpage: what it registers, it registers as any other plugin would."""

from __future__ import annotations

from kvpage import hookimpl
from kvpage.api.records import AttentionBackendRecord, ModelRecord


@hookimpl
def kvpage_attention_backends() -> list[AttentionBackendRecord]:
    return [
        AttentionBackendRecord(
            name="reference",
            factory="kvpage.builtin.reference_attention:ReferenceAttention",
            priority=-100,
            summary="plain torch; runs everything, on any device",
        )
    ]


@hookimpl
def kvpage_models() -> list[ModelRecord]:
    families = {
        "llama": ("LlamaForCausalLM",),
        "mistral": ("MistralForCausalLM",),
        "qwen2": ("Qwen2ForCausalLM",),
        "qwen3": ("Qwen3ForCausalLM",),
    }
    return [
        ModelRecord(
            name=name, factory=f"kvpage.models.families.{name}:translate", architectures=architectures
        )
        for name, architectures in families.items()
    ]
