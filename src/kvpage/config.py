"""Engine options, and ``resolve()``: the pure function that turns them into values and says why.

Components are never handed ``EngineOptions``; each receives the few values it uses.
"""

from __future__ import annotations

import difflib
import re
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from kvpage.errors import ConfigError

DTYPES: Mapping[str, str] = {
    "float32": "float32", "float": "float32", "bfloat16": "bfloat16", "float16": "float16", "half": "float16",
}  # fmt: skip
ELEMENT_SIZES: Mapping[str, int] = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1, "fp8_e4m3": 1}
SCALE_SIZES: Mapping[str, int] = {"int8": 4}
"""Bytes that a KV dtype takes beside its elements, for each K or V vector of a token and KV head."""
ALIASES: Mapping[str, str] = {
    "kv_cache_memory_bytes": "kv_cache_memory", "num_gpu_blocks_override": "num_kv_blocks",
}  # fmt: skip
NOT_YET: Mapping[str, str] = {
    "enable_lora": "LoRA",
    "lora_modules": "LoRA",
    "max_loras": "LoRA",
    "max_lora_rank": "LoRA",
    "speculative_config": "speculative decoding",
    "pipeline_parallel_size": "pipeline parallelism",
    "data_parallel_size": "data parallelism",
    "enable_expert_parallel": "expert parallelism",
    "distributed_executor_backend": "tensor parallelism",
    "swap_space": "preemption by swapping",
    "cpu_offload_gb": "weight offloading",
    "enable_sleep_mode": "sleep mode",
    "structured_outputs_config": "structured output",
    "kv_transfer_config": "KV connectors",
}
"""vLLM's options for what kvpage does not do yet: refused by name, never ignored."""
GIB = 2**30
LARGEST_BLOCK = 256
"""Tokens a block may always have; more, where a sequence can fill them."""


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """What a user may say about an engine. Names follow vLLM's; ``None`` means "choose for me".

    Attributes:
        model: a folder, a hub id, "demo" (the bundled model), or a loaded transformers model.
        tokenizer: folder, hub id or transformers tokenizer where it is not the model's own.
        skip_tokenizer_init: no tokenizer: token ids in, token ids out.
        tokenizer_mode: "auto", or "slow" for transformers' Python tokenizers.
        trust_remote_code: let transformers run code that comes with a model or a tokenizer.
        revision, tokenizer_revision, download_dir, hf_token: for the hub.
        load_format: "auto" = by the files that are there, the name of a checkpoint reader ("safetensors", or a
            plugin's), or "dummy" for random weights of the model's shape.
        dtype: of weights and activations: "auto" = the checkpoint's, "float32", "bfloat16", "float16", "half",
            "float".
        device: "auto" or "cpu"; GPU backends ("cuda", "cuda:1", "hip") have not landed yet.
        max_model_len: most tokens of a sequence, prompt included; ``None`` = the model's context.
        allow_long_max_model_len: accept a ``max_model_len`` beyond the model's context.
        max_num_seqs: sequences that run at once. max_num_batched_tokens: tokens of one step.
        scheduling_policy: "fcfs", "priority", the name of a plugin's, or a ``kvpage.api.scheduling.SchedulingPolicy``
            object.
        max_num_queued_reqs, max_num_queued_tokens: limits of the waiting queue.
        long_prefill_token_threshold: most tokens of one prompt in one step; 0 = no such limit.
        block_size: tokens a KV block; ``None`` = what the attention backend prefers.
        enable_prefix_caching: share KV blocks between equal prefixes.
        prefix_cache_key: key of the block hashes, for a cache that outlives the engine.
        num_kv_blocks: KV blocks, or
        kv_cache_memory: bytes for KV ("2GiB" too), or
        gpu_memory_utilization: share of a GPU's memory for weights and KV; not applicable on a CPU.
        kv_cache_dtype: "auto" = the model's dtype; "int8" where the attention backend has it.
        model_impl: "auto" = a model family of kvpage's where there is one, else transformers' own code with its
            attention in paged KV, slower; "kvpage" or "transformers" takes that path or refuses.
        attention_backend: name of a registered backend; ``None`` = the best that fits.
        decoder_backend: name of a registered decoder backend; ``None`` = the best that fits.
        quantization: quantization scheme, by name: "int8", "int8-weight-only", "int4" and "int4-weight-only"
            quantize plain weights while they load. A quantized checkpoint names its own.
        quantization_config: options of that scheme; {"quantize_head": false} leaves output head and token embedding
            as they are. For a checkpoint that is quantized already: {"int8_activations": false} lets no kernel round
            activations, which int4 kernels do in models of 16 bits.
        tensor_parallel_size: ranks the model is split over; more than 1 has not landed yet.
        seed: makes requests without a seed of their own repeatable in submission order; ``None`` = entropy.
        max_logprobs: most top log-probabilities a request may ask for; -1 = no limit.
        generation_config: "auto" takes sampling defaults from the model's generation_config.json, "none" not.
        chat_template: template text that replaces the model's own.
        enforce_eager: no graph capture (there is none on a CPU).
        disable_log_stats: no periodic line in the log.
    """

    model: Any = "demo"
    tokenizer: Any = None
    skip_tokenizer_init: bool = False
    tokenizer_mode: str = "auto"
    trust_remote_code: bool = False
    revision: str | None = None
    tokenizer_revision: str | None = None
    download_dir: str | None = None
    hf_token: str | None = None
    load_format: str = "auto"
    dtype: str = "auto"
    device: str = "auto"
    max_model_len: int | None = None
    allow_long_max_model_len: bool = False
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    scheduling_policy: Any = "fcfs"
    max_num_queued_reqs: int | None = None
    max_num_queued_tokens: int | None = None
    long_prefill_token_threshold: int = 0
    block_size: int | None = None
    enable_prefix_caching: bool = True
    prefix_cache_key: bytes | None = None
    num_kv_blocks: int | None = None
    kv_cache_memory: int | str | None = None
    gpu_memory_utilization: float | None = None
    kv_cache_dtype: str = "auto"
    model_impl: str = "auto"
    attention_backend: str | None = None
    decoder_backend: str | None = None
    quantization: str | None = None
    quantization_config: Mapping[str, Any] | None = None
    tensor_parallel_size: int = 1
    seed: int | None = None
    max_logprobs: int = 20
    generation_config: str = "auto"
    chat_template: str | None = None
    enforce_eager: bool = False
    disable_log_stats: bool = True

    def __post_init__(self) -> None:
        for name in ("max_model_len", "max_num_seqs", "max_num_batched_tokens", "max_num_queued_reqs",
                     "max_num_queued_tokens", "block_size", "num_kv_blocks"):  # fmt: skip
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ConfigError(f"{name} must be a positive integer, got {value!r}")
        for name, lowest in (("seed", 0), ("max_logprobs", -1), ("long_prefill_token_threshold", 0)):
            value = getattr(self, name)
            if value is not None and (
                isinstance(value, bool) or not isinstance(value, int) or value < lowest
            ):
                raise ConfigError(f"{name} must be at least {lowest}, an integer, got {value!r}")
        for name in ("skip_tokenizer_init", "trust_remote_code", "allow_long_max_model_len",
                     "enable_prefix_caching", "enforce_eager", "disable_log_stats"):  # fmt: skip
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} must be True or False, got {getattr(self, name)!r}")
        if self.tokenizer_mode not in {"auto", "slow"}:
            raise ConfigError(f"tokenizer_mode must be 'auto' or 'slow', got {self.tokenizer_mode!r}")
        key = self.prefix_cache_key
        if key is not None and not (isinstance(key, bytes) and 0 < len(key) <= 64):
            raise ConfigError(f"prefix_cache_key must be 1 to 64 bytes, got {type(key).__name__} {key!r:.80}")
        if self.model_impl not in {"auto", "kvpage", "transformers"}:
            raise ConfigError(
                f"model_impl must be 'auto', 'kvpage' or 'transformers', got {self.model_impl!r:.80}"
            )
        if self.dtype != "auto" and str(self.dtype).removeprefix("torch.") not in DTYPES:
            raise ConfigError(f"dtype must be 'auto' or one of {', '.join(DTYPES)}, got {self.dtype!r}")
        if not isinstance(self.load_format, str):
            raise ConfigError(f"load_format must be text, such as 'auto', got {self.load_format!r:.80}")
        if self.generation_config not in {"auto", "none", "vllm"}:
            raise ConfigError(f"generation_config must be 'auto' or 'none', got {self.generation_config!r}")
        utilization = self.gpu_memory_utilization
        if utilization is not None and not 0 < utilization <= 1:
            raise ConfigError(f"gpu_memory_utilization must be above 0 and at most 1, got {utilization!r}")
        config = self.quantization_config
        if config is not None and not isinstance(config, Mapping):
            raise ConfigError(
                f"quantization_config must be a mapping such as {{'quantize_head': False}}, got {config!r:.80}"
            )
        if self.tensor_parallel_size != 1:
            raise ConfigError(
                f"tensor_parallel_size={self.tensor_parallel_size}: tensor parallelism has not landed "
                "yet; use tensor_parallel_size=1 (kvpage plan -tp N sizes it already)"
            )
        parse_size(self.kv_cache_memory)

    @classmethod
    def from_keywords(cls, **options: Any) -> EngineOptions:
        """Options by name, vLLM's aliases included.

        Raises:
            ConfigError: an unknown name (the nearest known one is suggested), or a value out of range.
        """
        known = {f.name for f in fields(cls)}
        given: dict[str, Any] = {}
        for name, value in options.items():
            target = ALIASES.get(name, name)
            if name in NOT_YET and any(value is off for off in (None, False, 0, 1)):
                continue  # what vLLM does without the feature
            if name in NOT_YET:
                raise ConfigError(f"{name}: {NOT_YET[name]} has not landed yet; leave it out")
            if target not in known:
                near = difflib.get_close_matches(name, sorted(known | set(ALIASES)), n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise ConfigError(f"unknown engine option {name!r}{hint}")
            given[target] = value
        return cls(**given)


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupFacts:
    """One KV group, as far as memory goes: elements and vectors (two a layer and KV head) of K and V that one token
    takes in all its layers; ``bytes_per_block`` as a backend lays blocks out, ``None`` where none was asked yet."""

    elements_per_token: int
    vectors_per_token: int = 0
    window: int | None = None
    bytes_per_block: int | None = None

    def bytes_per_token(self, kv_dtype: str) -> int:
        """What K and V of one token need, scales included."""
        scale = SCALE_SIZES.get(kv_dtype, 0)
        return self.elements_per_token * ELEMENT_SIZES[kv_dtype] + self.vectors_per_token * scale

    def block_bytes(self, block_size: int, kv_dtype: str) -> int:
        """What a block of ``block_size`` tokens takes: as the backend lays it out, where that is known."""
        if self.bytes_per_block is not None:
            return self.bytes_per_block
        return block_size * self.bytes_per_token(kv_dtype)


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelFacts:
    """What ``resolve`` needs to know of a model: its context length, checkpoint dtype, KV groups."""

    context: int
    dtype: str
    groups: Sequence[GroupFacts]


@dataclass(frozen=True, kw_only=True, slots=True)
class MachineFacts:
    """``device`` is "cpu", "cuda" ...; memory in bytes: ``available`` now, on a GPU after the weights."""

    device: str
    available: int
    total: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Resolved:
    """Every value an engine runs with; ``reasons`` says where each came from.

    ``num_blocks`` a KV group, without the null block; ``kv_bytes`` what they take in all. ``attention_backend`` and
    ``decoder_backend`` are the names of those an engine took; "" in a plan, which takes none.
    """

    device: str
    dtype: str
    kv_dtype: str
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    block_size: int
    num_blocks: tuple[int, ...]
    kv_bytes: int
    reasons: Mapping[str, str] = field(default_factory=dict)
    notes: Sequence[str] = ()
    attention_backend: str = ""
    decoder_backend: str = ""


def resolve_dtype(options: EngineOptions, checkpoint_dtype: str, device: str) -> str:
    """The torch dtype name of weights and activations; "auto" avoids float16 on a CPU, where nothing runs it fast."""
    name = str(options.dtype).removeprefix("torch.")
    if name != "auto":
        return DTYPES[name]
    kept = checkpoint_dtype if checkpoint_dtype in ELEMENT_SIZES else "float32"
    return "bfloat16" if (kept, device) == ("float16", "cpu") else kept


def resolve_context(options: EngineOptions, context: int) -> tuple[int, str]:
    """(max_model_len, why). Raises ConfigError where it is beyond the model's context."""
    asked = options.max_model_len
    if asked is None:
        return context, "the model's context"
    if asked > context and not options.allow_long_max_model_len:
        raise ConfigError(
            f"max_model_len={asked} is beyond the model's context of {context} tokens: "
            f"use at most {context}, or allow_long_max_model_len=True to try regardless"
        )
    return asked, "given"


def resolve(
    options: EngineOptions, model: ModelFacts, machine: MachineFacts, preferred_block_size: int = 16
) -> Resolved:
    """Turn options into values, each with its reason. Pure: reads nothing but its arguments.

    Raises:
        ConfigError: options contradict the model or leave no room for KV.
    """
    reasons: dict[str, str] = {}
    notes: list[str] = []

    def choose(name: str, given: Any, otherwise: Callable[[], tuple[Any, str]]) -> Any:
        value, reasons[name] = (given, "given") if given is not None else otherwise()
        return value

    dtype = resolve_dtype(options, model.dtype, machine.device)
    reasons["dtype"] = "given" if options.dtype != "auto" else f"for a checkpoint of {model.dtype}"
    kv_dtype = _resolve_kv_dtype(options, dtype)
    max_model_len, reasons["max_model_len"] = resolve_context(options, model.context)
    on_cpu = machine.device == "cpu"
    max_num_seqs = choose("max_num_seqs", options.max_num_seqs, lambda: (64 if on_cpu else 256, "default"))
    budget = choose("max_num_batched_tokens", options.max_num_batched_tokens, lambda: (2048, "default"))
    block_size = choose(
        "block_size", options.block_size, lambda: (preferred_block_size, "the backend's preference")
    )
    _check_block_size(options.block_size, max_model_len)
    if budget < max_num_seqs:
        notes.append(
            f"max_num_batched_tokens={budget} is below max_num_seqs={max_num_seqs}: "
            f"at most {budget} sequences run at once"
        )
    if on_cpu and options.gpu_memory_utilization is not None:
        notes.append("gpu_memory_utilization is not applicable on a CPU: use kv_cache_memory")

    sizes = [g.block_bytes(block_size, kv_dtype) for g in model.groups]

    def shape(length: int) -> tuple[int, ...]:
        """Blocks that one sequence of ``length`` tokens holds, a group."""
        return tuple(blocks_per_sequence(g, block_size, length, budget) for g in model.groups)

    def cost(length: int) -> int:
        return sum(s * n for s, n in zip(sizes, shape(length), strict=True))

    def longest(fits: Callable[[int], bool]) -> int:
        """The longest sequence, up to max_model_len, that ``fits``; 0 if none does."""
        return bisect_left(range(1, max_model_len + 1), True, key=lambda length: not fits(length))

    per_sequence, bytes_per_sequence = shape(max_model_len), cost(max_model_len)
    if options.num_kv_blocks is not None:
        blocks = _share(options.num_kv_blocks, per_sequence, shape, longest)
        reasons["kv_memory"] = f"num_kv_blocks={options.num_kv_blocks} given"
    else:
        memory, reasons["kv_memory"] = kv_memory(
            options, machine, bytes_per_sequence * max_num_seqs + sum(sizes)
        )
        # Block 0 of each group is the null block: it takes memory and holds nothing.
        usable = memory - sum(sizes)
        copies = usable / bytes_per_sequence
        # Less than one sequence of full length: what the longest that fits needs, for a window does not shrink.
        blocks = (
            tuple(int(copies * n) for n in per_sequence)
            if copies >= 1
            else shape(longest(lambda length: cost(length) <= usable))
        )
        if min(blocks) < 1:
            raise ConfigError(
                f"{memory} bytes for KV hold no block: one block of {block_size} tokens takes "
                f"{sum(sizes)} bytes; raise kv_cache_memory or lower block_size"
            )
    if any(have < need for have, need in zip(blocks, per_sequence, strict=True)):
        held = longest(lambda length: all(n <= have for n, have in zip(shape(length), blocks, strict=True)))
        notes.append(
            f"the KV pool holds {held} tokens of one sequence, less than max_model_len={max_model_len}: "
            "longer requests are refused; raise kv_cache_memory or lower max_model_len"
        )
    return Resolved(
        device=machine.device, dtype=dtype, kv_dtype=kv_dtype, max_model_len=max_model_len,
        max_num_seqs=max_num_seqs, max_num_batched_tokens=budget, block_size=block_size, num_blocks=blocks,
        kv_bytes=sum((n + 1) * s for n, s in zip(blocks, sizes, strict=True)), reasons=reasons, notes=tuple(notes),
    )  # fmt: skip


def parse_size(value: int | str | None) -> int | None:
    """Bytes from 2147483648, "2GiB", "500MB", "1.5 GiB". Decimal and binary units are kept apart."""
    if value is None or (isinstance(value, int) and not isinstance(value, bool) and value > 0):
        return value
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?\s*", str(value), re.IGNORECASE)
    size = 0
    if match:
        number, unit, binary = match.groups()
        size = int(float(number) * (1024 if binary else 1000) ** " kmgt".index(unit.lower() or " "))
    if size < 1:
        raise ConfigError(
            f"a size must be a positive number of bytes or text like '2GiB' or '500MB', got {value!r}"
        )
    return size


def blocks_per_sequence(group: GroupFacts, block_size: int, max_model_len: int, budget: int) -> int:
    """Most blocks one sequence holds in a group: a window keeps the window and the chunk being computed."""
    tokens = max_model_len if group.window is None else min(max_model_len, group.window + budget + block_size)
    return -(-tokens // block_size)


def _resolve_kv_dtype(options: EngineOptions, dtype: str) -> str:
    """The torch dtype name of the cache; ``dtype``: the model's."""
    asked = options.kv_cache_dtype
    kv_dtype = dtype if asked == "auto" else DTYPES.get(asked, asked)
    if kv_dtype not in ELEMENT_SIZES:
        raise ConfigError(
            f"kv_cache_dtype must be 'auto' or one of {', '.join(ELEMENT_SIZES)}, got {kv_dtype!r}"
        )
    return kv_dtype


def _check_block_size(block_size: int | None, max_model_len: int) -> None:
    """Raises ConfigError: no sequence could ever fill such a block."""
    largest = max(LARGEST_BLOCK, 1 << (max_model_len - 1).bit_length())
    if block_size is not None and block_size > largest:
        raise ConfigError(
            f"block_size={block_size} is more than a sequence of max_model_len={max_model_len} tokens can fill: "
            f"use at most {largest}, or leave it out for the backend's preference"
        )


def _share(
    num_blocks: int,
    per_sequence: tuple[int, ...],
    shape: Callable[[int], tuple[int, ...]],
    longest: Callable[[Callable[[int], bool]], int],
) -> tuple[int, ...]:
    """``num_blocks`` for the group that needs most; the others in proportion, or what the longest sequence needs that
    those hold, where that is more: a window does not shrink with the pool."""
    most = max(per_sequence)
    if num_blocks >= most:
        return tuple(-(-num_blocks * n // most) for n in per_sequence)
    lead = per_sequence.index(most)
    needed = shape(max(1, longest(lambda length: shape(length)[lead] <= num_blocks)))
    return tuple(num_blocks if group == lead else n for group, n in enumerate(needed))


def kv_memory(options: EngineOptions, machine: MachineFacts, useful: int) -> tuple[int, str]:
    """(bytes for KV, why): may be negative on a GPU that the weights overfill. ``useful``: a CPU takes no more."""
    given = parse_size(options.kv_cache_memory)
    if given is not None:
        return given, "kv_cache_memory given"
    if machine.device == "cpu":
        limits = {"4 GiB": 4 * GIB, "a quarter of available memory": machine.available // 4,
                  "all that max_num_seqs x max_model_len can use": useful}  # fmt: skip
        name = min(limits, key=lambda key: limits[key])
        return limits[name], f"the least on a CPU: {name}"
    share = options.gpu_memory_utilization
    taken = machine.total - machine.available
    if share is None:
        return int(0.9 * machine.available), "0.9 of the free GPU memory"
    return int(share * machine.total) - taken, f"gpu_memory_utilization={share} less what is in use"
