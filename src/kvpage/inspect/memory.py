"""The sums of a memory plan: what weights, activations and the runtime take, and what is left for KV.

Pure arithmetic on a spec, engine options and device sizes. What the engine would choose (dtype, block size,
limits, KV memory) comes from ``kvpage.config``, the same functions that the engine calls.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, TypeAlias

from kvpage.api.model import DecoderSpec, MLPSpec
from kvpage.config import (
    ELEMENT_SIZES,
    EngineOptions,
    GroupFacts,
    MachineFacts,
    ModelFacts,
    Resolved,
    blocks_per_sequence,
    kv_memory,
    resolve,
)
from kvpage.errors import CheckpointError, ConfigError
from kvpage.inspect.held import HeldLine, held_lines
from kvpage.inspect.model_size import PlannedModel, Quantization, WeightSizes, kv_heads_per_device, weigh
from kvpage.inspect.plan_text import plan_text

if TYPE_CHECKING:
    from kvpage.models.fallback.spec import FallbackSpec

DEFAULT_GPU_SHARE = 0.9
"""Share of a GPU that an engine takes where nothing is said: the GPU is idle, so all of it is free at start."""

GPU_RUNTIME = 550_000_000
"""Bytes a GPU process holds beside tensors: context and kernels 350 MB, matrix libraries 100, graphs 100."""

COLLECTIVE_BUFFERS = 50_000_000
"""Bytes of communication buffers on each of several GPUs."""

CPU_RUNTIME = 350_000_000
"""Bytes of an interpreter with torch and a tokenizer loaded, and its allocator's slack."""

DEFAULT_BLOCK_SIZE = 16
"""Tokens of a block where no backend was asked."""

SAMPLER_COPIES = 3
"""float32 matrices of the size of the logits that are alive at once: logits, probabilities, sort order."""

LENGTHS = (512, 2048, 4096)
"""Sequence lengths that a plan counts sequences of, beside ``max_model_len``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Devices:
    """What to run on: ``count`` devices (tensor parallel ranks) of ``memory`` bytes; kind "cpu", "cuda", "hip"."""

    kind: str
    memory: int
    count: int = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockLayout:
    """KV blocks as the attention backend of an engine has them: tokens of a block, and its bytes by KV group."""

    block_size: int
    bytes_per_block: tuple[int, ...]


Layouts: TypeAlias = Callable[[EngineOptions], BlockLayout]
"""What an engine with these options would have; ConfigError where no backend serves it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Remedy:
    """Flags that would make it work, and what they would give."""

    flags: str
    effect: str


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """What a model takes on given devices. All sizes in bytes, for one device unless the name says ``total``.

    Attributes:
        model_path: by which path an engine runs it: a family of kvpage's, or transformers' own code.
        usable: what may be used of a device. kv_memory: what is left of it for KV; negative if nothing is.
        kv_bytes_per_token: of all KV groups. longest_sequence_bytes: KV of one sequence of ``max_model_len``,
            the null block included. tokens: that the KV pool holds.
        sequences: length -> how many sequences of that length fit at once.
        missing: what lacks before weights, activations, runtime and one KV block fit; 0 if they do.
        runnable: quantization formats that an engine of this installation runs.
        held: how the quantized weights of the checkpoint are held, form by form.
        remedies: what to turn, where it does not fit or no sequence of ``max_model_len`` does.
    """

    model: str
    family: str
    model_path: str
    devices: Devices
    quantization: str | None
    resolved: Resolved
    weights: WeightSizes
    activations: int
    runtime: int
    usable: int
    usable_reason: str
    kv_memory: int
    kv_bytes_per_token: int
    total_kv_bytes_per_token: int
    block_bytes: int
    longest_sequence_bytes: int
    tokens: int
    sequences: Mapping[int, int]
    missing: int
    runnable: tuple[str, ...] = ()
    held: tuple[HeldLine, ...] = ()
    remedies: Sequence[Remedy] = ()

    @property
    def fits(self) -> bool:
        """Whether there is room to start the engine."""
        return self.missing == 0

    @property
    def holds_longest(self) -> bool:
        """Whether it would start and one sequence of ``max_model_len`` fits."""
        return self.fits and self.sequences[self.resolved.max_model_len] > 0

    @property
    def cannot_run_yet(self) -> tuple[str, ...]:
        """What this plan or its remedies count on, and no engine of this version runs."""
        devices, flags = self.devices, " ".join(remedy.flags for remedy in self.remedies)
        advised = re.findall(r"--quantization (\S+)", flags)
        formats = {*advised, *([] if self.quantization is None else [self.quantization])}
        needed = {
            "GPUs (--gpu)": devices.kind != "cpu",
            "tensor parallelism (-tp)": devices.count > 1 or "-tp " in flags,
            "quantized checkpoints (--quantization)": not formats <= set(self.runnable),
        }
        return tuple(part for part, is_needed in needed.items() if is_needed)

    @property
    def total_usable(self) -> int:
        return self.usable * self.devices.count

    @property
    def total_kv_memory(self) -> int:
        return self.kv_memory * self.devices.count

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain data, for JSON."""
        data = asdict(self)
        data["sequences"] = {str(length): count for length, count in self.sequences.items()}
        return {"fits": self.fits, "holds_longest": self.holds_longest, "cannot_run_yet": self.cannot_run_yet, "total_usable": self.total_usable,
                "total_kv_memory": self.total_kv_memory, "total_weights": self.weights.total_bytes, **data}  # fmt: skip

    def to_text(self) -> str:
        """The plan for people, about 30 lines."""
        return plan_text(self)


def activation_bytes(
    spec: DecoderSpec | FallbackSpec, *, dtype: str, tokens: int, rows: int, ranks: int
) -> int:
    """Peak of a step's temporaries on one device, estimated as
    max_num_batched_tokens x (4 x hidden + the wider of attention and feed-forward) in the model's dtype
    + SAMPLER_COPIES x max_num_seqs x vocabulary in float32.

    Attention is taken to keep no score matrix. ``tokens`` of a step, ``rows`` whose logits are needed.
    """
    widest = 0
    for mixer in spec.attention:
        # q, k, v before and after rope, and the output of attention.
        heads, kv_heads = mixer.num_heads / ranks, kv_heads_per_device(mixer.num_kv_heads, ranks)
        width = 2 * (heads * mixer.head_dim + kv_heads * (mixer.head_dim + mixer.v_head_dim))
        widest = max(widest, int(width + heads * mixer.v_head_dim))
    for layer in spec.layers if isinstance(spec, DecoderSpec) else ():
        mlp, used = (layer.ffn, 1) if isinstance(layer.ffn, MLPSpec) else (layer.ffn.expert, layer.ffn.top_k)
        widest = max(widest, used * (3 if mlp.gated else 2) * mlp.intermediate_size // ranks)
    if not isinstance(spec, DecoderSpec):
        # Gate, up and down of the widest feed-forward, as far as shapes tell.
        widest = max([widest, *(3 * max(p.shape[-2:]) for p in spec.parameters if p.part in ("mlp", "moe"))])
    # Residual stream, its normed copy, the sublayer's output, and one copy in flight.
    step = tokens * (4 * spec.hidden_size + widest) * ELEMENT_SIZES[dtype]
    return step + SAMPLER_COPIES * rows * spec.vocab_size * ELEMENT_SIZES["float32"]


def runtime_bytes(devices: Devices) -> int:
    """What a process holds on its device beside weights, KV and activations."""
    if devices.kind == "cpu":
        return CPU_RUNTIME
    return GPU_RUNTIME + (COLLECTIVE_BUFFERS if devices.count > 1 else 0)


def split_reasons(spec: DecoderSpec | FallbackSpec, ranks: int) -> list[str]:
    """Why a model cannot be split over ``ranks`` devices; empty if it can."""
    if ranks > 1 and not isinstance(spec, DecoderSpec):
        return [f"{spec.family} runs through transformers, on one device"]
    reasons = []
    for mixer in spec.attention:
        if mixer.num_heads % ranks:
            reasons.append(f"{mixer.num_heads} attention heads do not divide by {ranks}")
        if mixer.num_kv_heads % ranks and ranks % mixer.num_kv_heads:
            reasons.append(
                f"{mixer.num_kv_heads} KV heads can be neither divided among {ranks} nor repeated evenly"
            )
    return sorted(set(reasons))


def measure(
    model: PlannedModel, options: EngineOptions, devices: Devices, layouts: Layouts | None = None
) -> MemoryPlan:
    """The plan without remedies. ``layouts``: asked once, if given; else blocks are taken to hold K and V alone.

    Raises:
        ConfigError: options contradict the model, or its heads cannot be split over that many devices.
    """
    spec, ranks = model.spec, devices.count
    reasons = split_reasons(spec, ranks)
    if reasons:
        possible = [str(n) for n in range(1, 65) if not split_reasons(spec, n)]
        raise ConfigError(f"-tp {ranks}: {'; '.join(reasons)}; possible are {', '.join(possible)}")
    options = _with_default_share(options, devices)
    facts, preferred = _model_facts(model, ranks), DEFAULT_BLOCK_SIZE
    if layouts is not None:
        facts, preferred = _laid_out(facts, layouts(options), ranks)
    # First what does not depend on memory: it decides what weights and activations take.
    sized = replace(options, num_kv_blocks=options.num_kv_blocks or 1)
    nothing_free = MachineFacts(device=devices.kind, available=0, total=devices.memory)
    chosen = resolve(sized, facts, nothing_free, preferred)
    quantization = _quantization(model, options)
    held = None if model.holding is None else model.holding(devices.kind, chosen.dtype, ranks)
    weights = weigh(model, dtype=chosen.dtype, ranks=ranks, quantization=quantization, held=held)
    activations = activation_bytes(
        spec, dtype=chosen.dtype, tokens=chosen.max_num_batched_tokens, rows=chosen.max_num_seqs, ranks=ranks
    )
    runtime = runtime_bytes(devices)
    taken = weights.device_bytes + activations + runtime
    machine = MachineFacts(device=devices.kind, available=devices.memory - taken, total=devices.memory)
    kv_token = sum(group.bytes_per_token(chosen.kv_dtype) for group in facts.groups)
    total_kv_token = sum(group.bytes_per_token(chosen.kv_dtype) for group in _model_facts(model, 1).groups)
    block_bytes = sum(group.block_bytes(chosen.block_size, chosen.kv_dtype) for group in facts.groups)
    longest = _sequence_bytes(facts, chosen)
    left = chosen.kv_bytes
    if options.num_kv_blocks is None:
        left = kv_memory(options, machine, longest * chosen.max_num_seqs + block_bytes)[0]
    usable, usable_reason = _usable(options, devices)
    # A pool has a null block, which holds nothing: two blocks are the least.
    missing = max(0, 2 * block_bytes - left, taken + max(left, 0) - usable)
    if not missing:
        chosen = resolve(options, facts, machine, preferred)
    lengths = sorted({length for length in LENGTHS if length < chosen.max_model_len} | {chosen.max_model_len})
    return MemoryPlan(
        model=model.name, family=spec.family, model_path=model.model_path, devices=devices,
        quantization=None if quantization is None else quantization.method,
        resolved=chosen, weights=weights, activations=activations, runtime=runtime, usable=usable,
        usable_reason=usable_reason, kv_memory=left, kv_bytes_per_token=kv_token,
        total_kv_bytes_per_token=total_kv_token,
        block_bytes=block_bytes, longest_sequence_bytes=longest + block_bytes,
        tokens=0 if missing else min(chosen.num_blocks) * chosen.block_size,
        sequences={length: 0 if missing else _sequences(facts.groups, chosen, length) for length in lengths},
        missing=missing, runnable=tuple(sorted(model.schemes)), held=held_lines(held or {}, ranks),
    )  # fmt: skip


def _with_default_share(options: EngineOptions, devices: Devices) -> EngineOptions:
    given = (options.gpu_memory_utilization, options.kv_cache_memory, options.num_kv_blocks)
    if devices.kind == "cpu" or any(value is not None for value in given):
        return options
    return replace(options, gpu_memory_utilization=DEFAULT_GPU_SHARE)


def _model_facts(model: PlannedModel, ranks: int) -> ModelFacts:
    groups = []
    for group in model.spec.kv_groups:
        heads = kv_heads_per_device(group.num_kv_heads, ranks)
        elements = replace(group, num_kv_heads=heads).bytes_per_token(1)
        vectors = 2 * len(group.layers) * heads
        groups.append(GroupFacts(elements_per_token=elements, vectors_per_token=vectors, window=group.window))
    return ModelFacts(context=model.spec.max_position, dtype=model.dtype, groups=groups)


def _laid_out(facts: ModelFacts, layout: BlockLayout, ranks: int) -> tuple[ModelFacts, int]:
    """``facts`` with blocks of the layout's bytes, which are those of an undivided model; and its block size."""
    if ranks > 1:
        return facts, layout.block_size
    groups = [
        replace(group, bytes_per_block=size)
        for group, size in zip(facts.groups, layout.bytes_per_block, strict=True)
    ]
    return replace(facts, groups=groups), layout.block_size


def _quantization(model: PlannedModel, options: EngineOptions) -> Quantization | None:
    config = model.quantization_config
    stated = config.get("quant_method")
    scheme = model.schemes.get(str(stated))
    names = (None, stated, *(() if scheme is None else (scheme.name, *scheme.methods)))
    if stated is not None and options.quantization not in names:
        raise CheckpointError(
            f"quantization={options.quantization!r} contradicts {model.name}, which is quantized by {stated!r}: "
            "leave the option out, or give the unquantized checkpoint"
        )
    method = stated or options.quantization
    if method is None:
        return None
    return Quantization.of(str(method), config, model.schemes, options.quantization_config)


def _sequence_bytes(facts: ModelFacts, chosen: Resolved) -> int:
    """KV of one sequence of ``max_model_len`` on one device."""
    return sum(
        blocks_per_sequence(group, chosen.block_size, chosen.max_model_len, chosen.max_num_batched_tokens)
        * group.block_bytes(chosen.block_size, chosen.kv_dtype)
        for group in facts.groups
    )  # fmt: skip


def _usable(options: EngineOptions, devices: Devices) -> tuple[int, str]:
    share = options.gpu_memory_utilization
    if devices.kind == "cpu" or share is None or options.kv_cache_memory or options.num_kv_blocks:
        return devices.memory, "all of it"
    return int(share * devices.memory), f"gpu_memory_utilization={share:g}"


def _sequences(groups: Sequence[GroupFacts], chosen: Resolved, length: int) -> int:
    return min(
        blocks // blocks_per_sequence(group, chosen.block_size, length, chosen.max_num_batched_tokens)
        for blocks, group in zip(chosen.num_blocks, groups, strict=True)
    )
