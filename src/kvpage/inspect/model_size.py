"""What a model's weights take, from its spec and, where there are any, the headers of its files.

Pure arithmetic: nothing is loaded, and nothing but the standard library is needed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from kvpage.api.model import DecoderSpec, WeightMap
from kvpage.api.parameters import Parameter, parameters
from kvpage.api.quant import CheckpointView
from kvpage.api.records import QuantizationSchemeRecord
from kvpage.config import ELEMENT_SIZES
from kvpage.errors import CheckpointError, ConfigError
from kvpage.inspect.held import Held, Holding, held_bytes

if TYPE_CHECKING:
    from kvpage.models.fallback.spec import FallbackSpec

Part: TypeAlias = Literal["embedding", "attention", "mlp", "moe", "norms", "head"]
PARTS: tuple[Part, ...] = ("embedding", "attention", "mlp", "moe", "norms", "head")

Sharding: TypeAlias = Literal["split", "kv", "replicated"]
"""split over all ranks; over the KV heads, which are repeated where ranks outnumber them; whole on each."""

FLOATING = frozenset({"F64", "F32", "F16", "BF16"})
"""Stored dtypes that loading converts to the engine's dtype; any other is kept as it is stored."""

TORCH_DTYPES: Mapping[str, tuple[str, int]] = {
    "float64": ("F64", 8), "float32": ("F32", 4), "float16": ("F16", 2), "bfloat16": ("BF16", 2), "int64": ("I64", 8),
    "int32": ("I32", 4), "int16": ("I16", 2), "int8": ("I8", 1), "uint8": ("U8", 1),
}  # fmt: skip
"""What safetensors calls torch's dtypes, and bytes an element."""

HEADER_LIMIT = 100_000_000
"""Longest safetensors header that is read; the format's own limit."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredTensor:
    """A tensor as a safetensors header states it: dtype ("BF16", "I32" ...), elements, bytes."""

    dtype: str
    count: int
    nbytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Quantization:
    """How linear weights are packed.

    Attributes:
        method: the format's name.
        bits: of a weight, with its share of what a group has (scale, zero point).
        output_bits: of what each output has besides (its scale).
        groups: inputs that share a scale besides, the first that divides a matrix's inputs; else it has 8 bits.
        head: the output head and the token embedding are packed too.
    """

    method: str
    bits: float
    output_bits: int = 0
    groups: tuple[int, ...] = ()
    head: bool = False

    @classmethod
    def of(
        cls,
        method: str,
        stated: Mapping[str, Any],
        schemes: Mapping[str, QuantizationSchemeRecord],
        options: Mapping[str, Any] | None = None,
    ) -> Quantization:
        """From a format's name, what the checkpoint's ``quantization_config`` states, and the records of ``schemes``.

        ``options``: the engine's ``quantization_config``, for a scheme that quantizes plain weights.

        Raises:
            ConfigError: a format of unknown size, or options that it does not take.
        """
        known = {**QUANTIZED_BITS, **{name: record.bits for name, record in schemes.items()}}
        if method not in known and stated:
            raise ConfigError(
                f"the checkpoint is quantized by {method!r} (quant_method), which no installed plugin reads, and "
                f"whose size is not known to the plan; known are {', '.join(sorted(known))}: install a plugin that "
                "reads it, or plan for the unquantized checkpoint"
            )
        if method not in known:
            raise ConfigError(
                f"quantization={method!r}: its size is not known to the plan; known are {', '.join(sorted(known))}"
            )
        scheme = schemes.get(method)
        if scheme is not None and not stated and not scheme.methods:
            scheme.check_options(options or {})
            return cls(
                method=method,
                bits=scheme.bits,
                output_bits=0 if scheme.groups else SCALE_BITS,
                groups=scheme.groups,
                head=scheme.packs_head and bool((options or {}).get("quantize_head", True)),
            )
        bits = float(stated.get("bits") or stated.get("w_bit") or known[method])
        group = int(stated.get("group_size") or stated.get("q_group_size") or GROUPS.get(method, 0))
        if group < 1:
            return cls(method=method, bits=bits, output_bits=SCALE_BITS)
        # Each group has a float16 scale and a zero point of the weights' own width.
        return cls(method=method, bits=bits + (16 + bits) / group)

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of a weight of ``shape`` [out, in]."""
        bits, output_bits = self.bits, self.output_bits
        if self.groups:
            group = next((size for size in self.groups if shape[1] % size == 0), None)
            bits, output_bits = (8, SCALE_BITS) if group is None else (bits + 16 / group, 0)
        return int(math.prod(shape) * bits + shape[0] * output_bits) // 8

    def packs(self, parameter: Parameter) -> bool:
        """Whether it packs ``parameter``: linear layers inside decoder layers, but routers; the head where it says."""
        if self.head and parameter.name in ("embed.weight", "head.weight"):
            return True
        return _is_packed(parameter)


SCALE_BITS = 32
"""Of the scale that an output has where groups have none."""

QUANTIZED_BITS: Mapping[str, float] = {"awq": 4, "gptq": 4, "fp8": 8}
"""Formats that a plan can size whether or not a scheme that reads them is installed."""

GROUPS: Mapping[str, int] = {"awq": 128, "gptq": 128}
"""Weights that share a scale where the format has groups and nothing states their size."""


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

    ``model_path``: by which path it runs. ``stored`` is empty for a folder with nothing but a config; ``quantization_config`` is the checkpoint's own.
    ``schemes``: formats that an engine of this installation loads (or quantizes to).
    ``on_the_fly``: those of them that quantize plain weights. ``holding``: how a quantized checkpoint's weights are
    held, by its scheme and the kernels of this installation.
    """

    name: str
    spec: DecoderSpec | FallbackSpec
    dtype: str
    model_path: str = ""
    weights: WeightMap = field(default_factory=dict)
    stored: Mapping[str, StoredTensor] = field(default_factory=dict)
    quantization_config: Mapping[str, Any] = field(default_factory=dict)
    schemes: Mapping[str, QuantizationSchemeRecord] = field(default_factory=dict)
    on_the_fly: tuple[str, ...] = ()
    holding: Holding | None = None


def weigh(
    model: PlannedModel,
    *,
    dtype: str,
    ranks: int,
    quantization: Quantization | None,
    held: Held | None = None,
) -> WeightSizes:
    """Bytes of the weights once loaded as ``dtype`` on ``ranks`` devices.

    What ``held`` has counts as that says. A tensor found in the file headers counts with its real size (floating ones converted to ``dtype``); any
    other as its spec says, packed as ``quantization`` says. Where ``quantization`` is not the checkpoint's own,
    plain weights count as packed too.
    """
    if not isinstance(model.spec, DecoderSpec):
        return _weigh_as_probed(model.spec, ELEMENT_SIZES[dtype])
    becomes_packed = quantization is not None and not model.quantization_config
    modules = _by_module(model.stored)
    element = ELEMENT_SIZES[dtype]
    total: dict[Part, int] = dict.fromkeys(PARTS, 0)
    device: dict[Part, int] = dict.fromkeys(PARTS, 0)
    count = found = seen = 0
    for parameter in parameters(model.spec):
        elements = math.prod(parameter.shape)
        known = None if held is None else held.get(parameter.name)
        if known is None:
            nbytes = _stored_bytes(model, modules, parameter, elements, element)
        else:
            nbytes = held_bytes(known, ranks)
        seen += 1
        found += nbytes is not None
        unknown = nbytes is None or becomes_packed
        if quantization is not None and unknown and quantization.packs(parameter):
            nbytes = quantization.nbytes(parameter.shape)
        elif nbytes is None:
            nbytes = elements * element
        count += elements
        part = _part(parameter)
        total[part] += nbytes
        device[part] += math.ceil(nbytes * _share(_sharding(parameter), model.spec, ranks))
    return WeightSizes(
        parameters=count,
        total={part: size for part, size in total.items() if size},
        per_device={part: size for part, size in device.items() if size},
        estimated=found < seen or becomes_packed,
    )


def _weigh_as_probed(spec: FallbackSpec, element: int) -> WeightSizes:
    """Bytes of a model that runs through transformers, on one device: its parameters as its own class makes them."""
    total: dict[Part, int] = {}
    for part in PARTS:
        size = sum(math.prod(p.shape) for p in spec.parameters if p.part == part) * element
        if size:
            total[part] = size
    count = sum(total.values()) // element
    return WeightSizes(parameters=count, total=total, per_device=total, estimated=True)


def kv_heads_per_device(num_kv_heads: int, ranks: int) -> int:
    """KV heads one rank holds: an equal share, at least one (then several ranks hold the same head)."""
    return max(1, -(-num_kv_heads // ranks))


def stored_tensors(view: CheckpointView) -> dict[str, StoredTensor]:
    """Every tensor that a checkpoint reader states, in the terms of safetensors headers."""
    tensors: dict[str, StoredTensor] = {}
    for name in view.names():
        info = view.info(name)
        dtype, size = TORCH_DTYPES.get(info.dtype, (info.dtype, 1))
        count = math.prod(info.shape)
        tensors[name] = StoredTensor(dtype=dtype, count=count, nbytes=count * size)
    return tensors


def read_headers(path: Path) -> dict[str, StoredTensor]:
    """Every tensor that the safetensors files of a folder, or one such file, state in their headers; no weight is
    read.

    Raises:
        CheckpointError: a file is not safetensors, or is cut off within its header.
    """
    tensors: dict[str, StoredTensor] = {}
    for file in [path] if path.is_file() else sorted(path.glob("*.safetensors")):
        try:
            for name, entry in _header(file).items():
                start, stop = entry["data_offsets"]
                tensors[name] = StoredTensor(
                    dtype=str(entry["dtype"]), count=math.prod(entry["shape"]), nbytes=stop - start
                )
        except (ValueError, TypeError, KeyError, AttributeError, OSError) as error:
            raise CheckpointError(
                f"{file} is not a whole safetensors file ({type(error).__name__}: {error}): fetch it again"
            ) from error
    return tensors


def _header(path: Path) -> dict[str, Any]:
    # safetensors: 8 bytes little-endian length, then that much JSON, then the data.
    with path.open("rb") as file:
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        text = file.read(length) if len(prefix) == 8 and length <= HEADER_LIMIT else b""
    if not text or len(text) != length:
        raise ValueError("it ends within its header")
    return {name: entry for name, entry in json.loads(text).items() if name != "__metadata__"}


def _part(parameter: Parameter) -> Part:
    name = parameter.name
    if parameter.kind == "norm" or "_norm" in name:
        return "norms"
    if name.startswith(("embed.", "positions.")):
        return "embedding"
    if name.startswith("head."):
        return "head"
    return "moe" if ".moe." in name else "mlp" if ".mlp." in name else "attention"


def _sharding(parameter: Parameter) -> Sharding:
    name = parameter.name
    added_once = name.endswith((".out.bias", ".down.bias")) or parameter.kind == "norm" or "_norm" in name
    whole = (
        name.startswith("positions.") or ".mixer." in name or ".router." in name or ".shared_gate." in name
    )
    if added_once or whole:
        return "replicated"
    return "kv" if ".attention.k." in name or ".attention.v." in name else "split"


def _is_packed(parameter: Parameter) -> bool:
    """Whether quantization formats pack it: the linear layers inside decoder layers, but routers."""
    plain = (".router.", ".shared_gate.")
    return (
        parameter.kind == "linear"
        and parameter.name.startswith("layers.")
        and not any(part in parameter.name for part in plain)
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
    model: PlannedModel, modules: Mapping[str, int], parameter: Parameter, elements: int, element: int
) -> int | None:
    """Bytes of a parameter by the file headers; ``None`` where they do not have it."""
    place = model.weights.get(parameter.name)
    if place is None:
        return None
    tensor = model.stored.get(place.name)
    if tensor is None:
        return modules.get(place.name.removesuffix(".weight")) if _is_packed(parameter) else None
    if tensor.dtype in FLOATING:
        return elements * element
    return tensor.nbytes * elements // max(1, tensor.count)
