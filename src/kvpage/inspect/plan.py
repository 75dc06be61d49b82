"""The memory plan: will a model fit on these devices, what is left for KV, and what to change if it does not."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations, product
from typing import TYPE_CHECKING, Any

from kvpage.api.model import DecoderSpec
from kvpage.config import EngineOptions
from kvpage.errors import ConfigError
from kvpage.inspect.memory import (
    BlockLayout,
    Devices,
    Layouts,
    MemoryPlan,
    Remedy,
    measure,
    split_reasons,
)
from kvpage.inspect.model_size import PlannedModel
from kvpage.inspect.plan_text import readable_bytes

if TYPE_CHECKING:
    from kvpage.models.fallback.spec import FallbackSpec

__all__ = ["BlockLayout", "Devices", "Layouts", "MemoryPlan", "PlannedModel", "Remedy", "plan_memory"]

GB = 10**9
SHARES = (0.9, 0.92, 0.95, 0.97)
DEVICE_COUNTS = (2, 4, 8, 16, 32)
DEVICE_SIZES = (16, 24, 32, 40, 48, 64, 80, 96, 141, 192, 288)
"""GB of memory that GPUs are sold with."""
CPU_SIZES = (8, 16, 32, 64, 128, 256, 512, 1024, 2048)
"""GiB of memory that machines are sold with."""
BUDGETS = (1024, 512, 256)
KV_STEP = 2**28
"""Bytes that a suggested KV memory is rounded up to."""


def plan_memory(
    model: PlannedModel, options: EngineOptions, devices: Devices, layouts: Layouts | None = None
) -> MemoryPlan:
    """What ``model`` takes on ``devices`` with ``options``; where that is too much, what to turn.

    ``devices.count`` takes the place of ``options.tensor_parallel_size``. ``layouts``: the KV blocks of the engine that
    is planned; without it a block holds 16 tokens, and K and V alone.

    Raises:
        ConfigError: options contradict the model, its heads cannot be split over that many devices, or ``layouts``
            raises it.
    """
    plan = measure(model, options, devices, layouts)
    if plan.holds_longest:
        return plan
    return replace(plan, remedies=tuple(_remedies(model, options, devices, plan, layouts)))


@dataclass(frozen=True, kw_only=True, slots=True)
class _Change:
    """One flag turned: how it is typed, and what it changes in the plan's inputs."""

    flag: str
    options: Mapping[str, Any] = field(default_factory=dict)
    devices: Mapping[str, Any] = field(default_factory=dict)


def _remedies(
    model: PlannedModel, options: EngineOptions, devices: Devices, plan: MemoryPlan, layouts: Layouts | None
) -> list[Remedy]:
    """The least change of each kind that works by itself: of the engine's flags, then of the hardware.

    Where no flag is enough alone, the least pairs of flags; at last any pair.
    """

    def first(candidates: Iterable[tuple[_Change, ...]]) -> Remedy | None:
        for changes in candidates:
            turned = {name: value for change in changes for name, value in change.options.items()}
            moved = {name: value for change in changes for name, value in change.devices.items()}
            try:
                trial = measure(model, replace(options, **turned), replace(devices, **moved), layouts)
            except ConfigError:  # no engine takes it: no remedy
                continue
            if trial.holds_longest:
                return Remedy(flags=" ".join(change.flag for change in changes), effect=_effect(trial))
        return None

    def alone(kinds: Sequence[Sequence[_Change]]) -> list[Remedy]:
        return [remedy for kind in kinds if (remedy := first((change,) for change in kind))]

    def together(kinds: Sequence[Sequence[_Change]]) -> list[Remedy]:
        return [remedy for pair in combinations(kinds, 2) if (remedy := first(product(*pair)))]

    flags = [*_memory_changes(options, devices, plan), *_model_changes(model, plan)]
    hardware = _hardware_changes(model.spec, devices)
    found = (alone(flags) or together(flags)) + alone(hardware)
    return found or together([*flags, *hardware])


def _memory_changes(options: EngineOptions, devices: Devices, plan: MemoryPlan) -> list[list[_Change]]:
    explicit = options.kv_cache_memory is not None or options.num_kv_blocks is not None
    if explicit or devices.kind == "cpu":
        size = -(-plan.longest_sequence_bytes // KV_STEP) * KV_STEP
        return [[_Change(flag=f"--kv-cache-memory {size / 2**30:g}GiB",
                         options={"kv_cache_memory": size, "num_kv_blocks": None})]]  # fmt: skip
    share = plan.usable / devices.memory
    return [[_Change(flag=f"--gpu-memory-utilization {value:g}", options={"gpu_memory_utilization": value})
             for value in SHARES if value > share + 0.001]]  # fmt: skip


def _model_changes(model: PlannedModel, plan: MemoryPlan) -> list[list[_Change]]:
    chosen = plan.resolved
    kinds = []
    if plan.quantization is None:
        if chosen.dtype == "float32":
            kinds.append([_Change(flag="--dtype bfloat16", options={"dtype": "bfloat16"})])
        largest_first = sorted(model.on_the_fly, key=lambda name: -model.schemes[name].bits)
        for names in (largest_first, ["awq"]):
            kinds.append(
                [_Change(flag=f"--quantization {name}", options={"quantization": name}) for name in names]
            )
    if plan.fits:
        lengths = (2**power for power in range(chosen.max_model_len.bit_length(), 6, -1))
        kinds.append([_Change(flag=f"--max-model-len {length}", options={"max_model_len": length})
                      for length in lengths if length < chosen.max_model_len])  # fmt: skip
    kinds.append([_Change(flag=f"--max-num-batched-tokens {budget}", options={"max_num_batched_tokens": budget})
                  for budget in BUDGETS if budget < chosen.max_num_batched_tokens])  # fmt: skip
    return kinds


def _hardware_changes(spec: DecoderSpec | FallbackSpec, devices: Devices) -> list[list[_Change]]:
    if devices.kind == "cpu":
        sizes = [size * 2**30 for size in CPU_SIZES if size * 2**30 > devices.memory]
        return [[_Change(flag=f"--memory {size // 2**30}GiB", devices={"memory": size}) for size in sizes]]
    counts = [count for count in DEVICE_COUNTS if count > devices.count and not split_reasons(spec, count)]
    # A card sold as 80 GB may report a little more or less.
    cards = [size for size in DEVICE_SIZES if size * GB > 1.08 * devices.memory]
    return [
        [_Change(flag=f"-tp {count}", devices={"count": count}) for count in counts],
        [_Change(flag=f"--gpu {size}GB", devices={"memory": size * GB}) for size in cards],
    ]


def _effect(plan: MemoryPlan) -> str:
    longest = plan.resolved.max_model_len
    return (
        f"weights {readable_bytes(plan.weights.total_bytes)}, {readable_bytes(plan.total_kv_memory)} for KV: "
        f"{plan.sequences[longest]} of {longest:,} tokens at once"
    )
