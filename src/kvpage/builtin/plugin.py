"""The plugin that ships with kvpage: what it registers, it registers as any other plugin would."""

from __future__ import annotations

from kvpage import hookimpl
from kvpage.api.records import (
    AttentionBackendRecord,
    CheckpointReaderRecord,
    DecoderBackendRecord,
    LinearKernelRecord,
    ModelRecord,
    SamplingKernelRecord,
    SchedulingPolicyRecord,
)


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
def kvpage_decoder_backends() -> list[DecoderBackendRecord]:
    return [
        DecoderBackendRecord(
            name="torch",
            factory="kvpage.models.decoder:TorchDecoder",
            priority=-100,
            summary="layer by layer in torch; runs every model, over any attention backend",
        )
    ]


@hookimpl
def kvpage_checkpoint_readers() -> list[CheckpointReaderRecord]:
    return [
        CheckpointReaderRecord(
            name="safetensors",
            factory="kvpage.loading.readers:SafetensorsReader",
            files=("*.safetensors",),
            summary="a folder in Hugging Face layout",
        )
    ]


@hookimpl
def kvpage_models() -> list[ModelRecord]:
    families = {
        "cohere": ("CohereForCausalLM",),
        "cohere2": ("Cohere2ForCausalLM",),
        "gemma": ("GemmaForCausalLM",),
        "gemma2": ("Gemma2ForCausalLM",),
        "gemma3": ("Gemma3ForCausalLM", "Gemma3ForConditionalGeneration"),
        "gpt2": ("GPT2LMHeadModel",),
        "gpt_neox": ("GPTNeoXForCausalLM",),
        "deepseek_v2": ("DeepseekV2ForCausalLM",),
        "deepseek_v3": ("DeepseekV3ForCausalLM",),
        "granite": ("GraniteForCausalLM",),
        "llama": ("LlamaForCausalLM",),
        "mistral": ("MistralForCausalLM",),
        "mixtral": ("MixtralForCausalLM",),
        "olmo2": ("Olmo2ForCausalLM",),
        "olmo3": ("Olmo3ForCausalLM",),
        "olmoe": ("OlmoeForCausalLM",),
        "opt": ("OPTForCausalLM",),
        "phi": ("PhiForCausalLM",),
        "phi3": ("Phi3ForCausalLM",),
        "qwen2": ("Qwen2ForCausalLM",),
        "qwen2_moe": ("Qwen2MoeForCausalLM",),
        "qwen3": ("Qwen3ForCausalLM",),
        "qwen3_moe": ("Qwen3MoeForCausalLM",),
        "smollm3": ("SmolLM3ForCausalLM",),
        "stablelm": ("StableLmForCausalLM",),
        "starcoder2": ("Starcoder2ForCausalLM",),
    }
    return [
        ModelRecord(
            name=name, factory=f"kvpage.models.families.{name}:translate", architectures=architectures
        )
        for name, architectures in families.items()
    ]


@hookimpl
def kvpage_scheduling_policies() -> list[SchedulingPolicyRecord]:
    return [
        SchedulingPolicyRecord(
            name="fcfs",
            factory="kvpage.sched.policy:FirstComeFirstServed",
            summary="in the order of submission",
        ),
        SchedulingPolicyRecord(
            name="priority",
            factory="kvpage.sched.policy:PriorityFirst",
            summary="lower priority first, then in the order of submission",
        ),
    ]


@hookimpl
def kvpage_linear_kernels() -> list[LinearKernelRecord]:
    return [
        LinearKernelRecord(
            name="int8",
            factory="kvpage.nn.quantized_linear:Int8Linear",
            summary="int8 with one scale an output, converted block by block",
        ),
        LinearKernelRecord(
            name="dequantize",
            factory="kvpage.nn.quantized_linear:DequantizeLinear",
            priority=-100,
            summary="any form, as plain weights in the model's dtype",
        ),
        LinearKernelRecord(
            name="torch",
            factory="kvpage.nn.linear:DenseLinear",
            priority=-100,
            summary="plain weights, where they lie",
        ),
    ]


@hookimpl
def kvpage_sampling_kernels() -> list[SamplingKernelRecord]:
    return [
        SamplingKernelRecord(
            name="torch",
            factory="kvpage.sample.draw:TorchSampling",
            priority=-100,
            summary="torch and numpy; any device",
        )
    ]
