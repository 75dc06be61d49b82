"""What a model's weights take, from its spec and, where there are any, the headers of its files.

Pure arithmetic: nothing is loaded, and nothing but the standard library is needed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

from kvpage.api.model import AttentionSpec, DecoderSpec, MLPSpec, MoESpec, NormSpec, WeightMap
from kvpage.config import ELEMENT_SIZES
from kvpage.errors import CheckpointError, ConfigError

Part: TypeAlias = Literal["embedding", "attention", "mlp", "moe", "norms", "head"]
PARTS: tuple[Part, ...] = ("embedding", "attention", "mlp", "moe", "norms", "head")

Sharding: TypeAlias = Literal["split", "kv", "replicated"]
"""split over all ranks; over the KV heads, which are repeated where ranks outnumber them; whole on each."""

FLOATING = frozenset({"F64", "F32", "F16", "BF16"})
"""Stored dtypes that loading converts to the engine's dtype; any other is kept as it is stored."""

HEADER_LIMIT = 100_000_000
"""Longest safetensors header that is read; the format's own limit."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Parameter:
    """One weight of the model under kvpage's name for it (``kvpage.api.model.WeightMap``).

    ``linear``: a matrix that quantization formats pack.
    """

    name: str
    part: Part
    count: int
    sharding: Sharding
    linear: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredTensor:
    """A tensor as a safetensors header states it: dtype ("BF16", "I32" ...), elements, bytes."""

    dtype: str
    count: int
    nbytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Quantization:
    """How linear weights are packed: the format's name, and bits a weight with its scales and zeros."""

    method: str
    bits: float

    @classmethod
    def of(cls, method: str, stated: Mapping[str, Any]) -> Quantization:
        """From a format's name and what the checkpoint's ``quantization_config`` states.

        Raises:
            ConfigError: a format of unknown size.
        """
        if method not in QUANTIZED_BITS:
            known = ", ".join(sorted(QUANTIZED_BITS))
            raise ConfigError(
                f"quantization={method!r}: its size is not known to the plan; known are {known}"
            )
        bits = int(stated.get("bits") or stated.get("w_bit") or QUANTIZED_BITS[method])
        group = int(stated.get("group_size") or stated.get("q_group_size") or 128)
        if method not in {"awq", "gptq"} or group < 1:
            return cls(method=method, bits=bits)
        # Each group has a float16 scale and a zero point of the weights' own width.
        return cls(method=method, bits=bits + (16 + bits) / group)


QUANTIZED_BITS: Mapping[str, int] = {"awq": 4, "gptq": 4, "int8": 8, "fp8": 8}


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightSizes:
    """Bytes by part: of the whole model, and of the fullest device. ``estimated``: not all from file headers."""

    parameters: int
    total: Mapping[Part, int]
    per_device: Mapping[Part, int]
    estimated: bool

    @property
    def total_bytes(self) -> int:
        return sum(self.total.values())

    @property
    def device_bytes(self) -> int:
        return sum(self.per_device.values())


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedModel:
    """What a plan knows of a model: its spec, the dtype it is stored in, and what its files' headers say.

    ``stored`` is empty for a folder with nothing but a config; ``quantization_config`` is the checkpoint's own.
    """

    name: str
    spec: DecoderSpec
    dtype: str
    weights: WeightMap = field(default_factory=dict)
    stored: Mapping[str, StoredTensor] = field(default_factory=dict)
    quantization_config: Mapping[str, Any] = field(default_factory=dict)


def parameters_of(spec: DecoderSpec) -> Iterator[Parameter]:
    """Every weight of a model.

    Raises:
        ConfigError: a layer's token mixer is a plugin's own, whose weights only its module knows.
    """
    hidden = spec.hidden_size
    yield Parameter(name="embed.weight", part="embedding", count=spec.vocab_size * hidden, sharding="split")
    if spec.embedding.positions is not None:
        rows = spec.embedding.positions + spec.embedding.position_offset
        yield Parameter(name="positions.weight", part="embedding", count=rows * hidden, sharding="replicated")
    for index, layer in enumerate(spec.layers):
        prefix = f"layers.{index}."
        for place in ("mixer_norm_before", "mixer_norm_after", "ffn_norm_before", "ffn_norm_after"):
            yield from _norm(prefix + place, getattr(layer, place), hidden)
        if not isinstance(layer.mixer, AttentionSpec):
            raise ConfigError(
                f"layer {index} mixes tokens by {type(layer.mixer).__name__}, which a plan cannot size"
            )
        yield from _attention(prefix + "attention.", layer.mixer, hidden)
        if isinstance(layer.ffn, MLPSpec):
            yield from _mlp(prefix + "mlp.", "mlp", layer.ffn, hidden)
        else:
            yield from _moe(prefix + "moe.", layer.ffn, hidden)
    yield from _norm("final_norm", spec.final_norm, hidden)
    if not spec.head.tied:
        yield Parameter(name="head.weight", part="head", count=spec.vocab_size * hidden, sharding="split")
    if spec.head.bias:
        yield Parameter(name="head.bias", part="head", count=spec.vocab_size, sharding="split")


def weigh(model: PlannedModel, *, dtype: str, ranks: int, quantization: Quantization | None) -> WeightSizes:
    """Bytes of the weights once loaded as ``dtype`` on ``ranks`` devices.

    A tensor found in the file headers counts with its real size (floating ones converted to ``dtype``);
    any other as its spec says, packed as ``quantization`` says.
    """
    packed = _by_module(model.stored)
    element = ELEMENT_SIZES[dtype]
    total: dict[Part, int] = dict.fromkeys(PARTS, 0)
    device: dict[Part, int] = dict.fromkeys(PARTS, 0)
    parameters = found = seen = 0
    for parameter in parameters_of(model.spec):
        nbytes = _stored_bytes(model, packed, parameter, element)
        seen += 1
        found += nbytes is not None
        if nbytes is None:
            bits = quantization.bits if quantization is not None and parameter.linear else 8 * element
            nbytes = int(parameter.count * bits / 8)
        parameters += parameter.count
        total[parameter.part] += nbytes
        device[parameter.part] += -int(-nbytes * _share(parameter.sharding, model.spec, ranks) // 1)
    return WeightSizes(
        parameters=parameters,
        total={part: size for part, size in total.items() if size},
        per_device={part: size for part, size in device.items() if size},
        estimated=found < seen,
    )


def kv_heads_per_device(num_kv_heads: int, ranks: int) -> int:
    """KV heads one rank holds: an equal share, at least one (then several ranks hold the same head)."""
    return max(1, -(-num_kv_heads // ranks))


def read_headers(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor that the safetensors files of ``folder`` state in their headers; no weight is read.

    Raises:
        CheckpointError: a file is not safetensors, or is cut off within its header.
    """
    tensors: dict[str, StoredTensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        for name, entry in _header(path).items():
            count = 1
            for size in entry["shape"]:
                count *= size
            start, stop = entry["data_offsets"]
            tensors[name] = StoredTensor(dtype=entry["dtype"], count=count, nbytes=stop - start)
    return tensors


def _header(path: Path) -> dict[str, Any]:
    # safetensors: 8 bytes little-endian length, then that much JSON, then the data.
    with path.open("rb") as file:
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        text = file.read(length) if len(prefix) == 8 and length <= HEADER_LIMIT else b""
    try:
        if not text or len(text) != length:
            raise ValueError("the file ends within its header")
        entries = json.loads(text)
        entries.pop("__metadata__", None)
    except (ValueError, AttributeError) as error:
        raise CheckpointError(f"{path} is not a whole safetensors file ({error}): fetch it again") from None
    return dict(entries)


def _norm(name: str, norm: NormSpec | None, size: int) -> Iterator[Parameter]:
    if norm is not None:
        yield Parameter(name=f"{name}.weight", part="norms", count=size, sharding="replicated")
        if norm.bias:
            yield Parameter(name=f"{name}.bias", part="norms", count=size, sharding="replicated")


def _attention(prefix: str, spec: AttentionSpec, hidden: int) -> Iterator[Parameter]:
    widths: tuple[tuple[str, int, Sharding], ...] = (
        ("q", spec.num_heads * spec.head_dim, "split"),
        ("k", spec.num_kv_heads * spec.head_dim, "kv"),
        ("v", spec.num_kv_heads * spec.v_head_dim, "kv"),
    )
    for name, width, sharding in widths:
        yield Parameter(
            name=f"{prefix}{name}.weight",
            part="attention",
            count=hidden * width,
            sharding=sharding,
            linear=True,
        )
        if spec.qkv_bias:
            yield Parameter(name=f"{prefix}{name}.bias", part="attention", count=width, sharding=sharding)
    width = spec.num_heads * spec.v_head_dim
    yield Parameter(
        name=f"{prefix}out.weight", part="attention", count=hidden * width, sharding="split", linear=True
    )
    if spec.out_bias:
        yield Parameter(name=f"{prefix}out.bias", part="attention", count=hidden, sharding="replicated")
    if spec.qk_norm is not None:
        for name, heads in (("q_norm", spec.num_heads), ("k_norm", spec.num_kv_heads)):
            count = spec.head_dim * (heads if spec.qk_norm.over == "all" else 1)
            yield Parameter(name=f"{prefix}{name}.weight", part="norms", count=count, sharding="replicated")
    if spec.sinks:
        yield Parameter(name=f"{prefix}sinks", part="attention", count=spec.num_heads, sharding="split")


def _mlp(prefix: str, part: Part, spec: MLPSpec, hidden: int) -> Iterator[Parameter]:
    for name in ("gate", "up", "down") if spec.gated else ("up", "down"):
        yield Parameter(
            name=f"{prefix}{name}.weight",
            part=part,
            count=hidden * spec.intermediate_size,
            sharding="split",
            linear=True,
        )
        if spec.bias:
            down = name == "down"
            yield Parameter(
                name=f"{prefix}{name}.bias",
                part=part,
                count=hidden if down else spec.intermediate_size,
                sharding="replicated" if down else "split",
            )


def _moe(prefix: str, spec: MoESpec, hidden: int) -> Iterator[Parameter]:
    yield Parameter(
        name=f"{prefix}router.weight", part="moe", count=spec.num_experts * hidden, sharding="replicated"
    )
    for expert in range(spec.num_experts):
        yield from _mlp(f"{prefix}experts.{expert}.", "moe", spec.expert, hidden)
    if spec.shared is not None:
        yield from _mlp(f"{prefix}shared.", "moe", spec.shared, hidden)
        if spec.shared_gate:
            yield Parameter(
                name=f"{prefix}shared_gate.weight", part="moe", count=hidden, sharding="replicated"
            )


def _share(sharding: Sharding, spec: DecoderSpec, ranks: int) -> float:
    if sharding == "replicated":
        return 1.0
    if sharding == "kv":
        return max(kv_heads_per_device(g.num_kv_heads, ranks) / g.num_kv_heads for g in spec.kv_groups)
    return 1 / ranks


def _by_module(stored: Mapping[str, StoredTensor]) -> dict[str, int]:
    """Module name -> bytes of all its tensors (a packed linear layer has codes, scales, zeros)."""
    sizes: dict[str, int] = {}
    for name, tensor in stored.items():
        module = name.rpartition(".")[0]
        sizes[module] = sizes.get(module, 0) + tensor.nbytes
    return sizes


def _stored_bytes(
    model: PlannedModel, packed: Mapping[str, int], parameter: Parameter, element: int
) -> int | None:
    """Bytes of a parameter by the file headers; ``None`` where they do not have it."""
    place = model.weights.get(parameter.name)
    if place is None:
        return None
    tensor = model.stored.get(place.name)
    if tensor is None:
        return packed.get(place.name.removesuffix(".weight")) if parameter.linear else None
    if tensor.dtype in FLOATING:
        return parameter.count * element
    return tensor.nbytes * parameter.count // max(1, tensor.count)
