"""Checkpoints of bitsandbytes: 4-bit floats in blocks (QLoRA, arXiv:2305.14314) and LLM.int8() (arXiv:2208.07339).

A weight [N, K] of 4 bits is one column of bytes, row after row, the even element in the high half; every ``blocksize``
elements share a scale (absmax), whatever the rows. With double quantization the scales are bytes themselves:
scale = nested_quant_map[byte] * nested_absmax[block // nested_blocksize] + nested_offset.
https://huggingface.co/docs/bitsandbytes
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from kvpage import CheckpointError
from kvpage.api.quant import (
    ChannelInt8,
    CheckpointView,
    Codebook,
    Dense,
    LinearSpec,
    QuantScheme,
    TensorSpec,
    WeightForm,
)

TYPES = ("nf4", "fp4")
STATE = "weight.quant_state.bitsandbytes__"
STORAGES = ("uint8", "int8", "float16", "bfloat16", "float32")
"""Dtypes that the packed bytes may be viewed as (``bnb_4bit_quant_storage``)."""

MAX_STATE_BYTES = 64 * 2**10
LARGEST = 2.0**127
PER_127 = 7.874015718698502e-3
"""1 / 127 as bitsandbytes multiplies by it."""

NESTED = ("weight.nested_absmax", "weight.nested_quant_map")
AGAIN = "download it again, or quantize it anew with bitsandbytes"


@dataclass(frozen=True, kw_only=True, slots=True)
class _Blocks:
    """What a quant_state says: elements that share a scale, and scales that share one of theirs."""

    size: int
    nested_size: int = 0
    nested_offset: float = 0.0


class BitsAndBytes(QuantScheme):
    """Reads nf4, fp4 and int8, module by module as the file has them; modules without their tensors are plain.

    int8 is computed weight-only. LLM.int8() finds the columns to keep in 16 bits over the whole batch, so that the
    answer to one request would depend on those beside it; unrounded activations are also the more accurate ones.
    """

    def __init__(self, view: CheckpointView, kind: str | None = None) -> None:
        """``kind``: the format that all quantized modules have ("nf4", "fp4", "int8"); ``None``: whichever they have."""
        self._view, self._kind = view, kind
        # Files of the first releases have no weight_format at all; in others every int8 module has one.
        self._states_layout = any(name.endswith(".weight_format") for name in view.names())

    @classmethod
    def from_checkpoint(cls, config: Mapping[str, Any], view: CheckpointView) -> BitsAndBytes:
        """Raises CheckpointError: ``config`` asks for 4 and 8 bits, or for a 4-bit type that bitsandbytes does not have."""
        asked = {}
        for key in ("load_in_4bit", "load_in_8bit"):
            value = config.get(key, config.get(f"_{key}"))
            if value not in (None, True, False):
                raise CheckpointError(
                    f"quantization_config: {key} must be true or false, found {value!r:.80}"
                )
            asked[key] = bool(value)
        if all(asked.values()):
            raise CheckpointError(
                "quantization_config: load_in_4bit and load_in_8bit are both true; a checkpoint is one of them"
            )
        if asked["load_in_8bit"]:
            return cls(view, "int8")
        kind = config.get("bnb_4bit_quant_type")
        if not asked["load_in_4bit"] or kind is None:
            return cls(view)
        if kind not in TYPES:
            raise CheckpointError(
                f"quantization_config: bnb_4bit_quant_type is {kind!r:.80}, expected {' or '.join(TYPES)}"
            )
        return cls(view, kind)

    def tensors(self, linear: LinearSpec, view: CheckpointView) -> Mapping[str, TensorSpec]:
        names = view.names()
        weight = f"{linear.name}.weight"
        if f"{linear.name}.SCB" in names:
            self._expect("int8", f"{linear.name}.SCB")
            return self._int8_tensors(linear)
        packed = any(f"{weight}.{part}" in names for part in ("absmax", "quant_map"))
        if packed or any(f"{linear.name}.{STATE}{kind}" in names for kind in TYPES):
            return self._packed_tensors(linear, view)
        if weight in names:
            info = view.info(weight)
            if info.dtype == "int8":
                raise self._wrong(f"{linear.name}.SCB", "the scales of an int8 weight", "no such tensor")
            if info.dtype == "uint8" or (info.shape[1:] == (1,) and linear.in_features > 1):
                raise self._wrong(
                    f"{linear.name}.{STATE}nf4", "the quant_state of 4-bit weights", "no such tensor"
                )
        return {}

    def to_form(self, linear: LinearSpec, tensors: Mapping[str, torch.Tensor]) -> WeightForm:
        if "SCB" in tensors:
            return self._int8(linear, tensors)
        blocks, absmax = self._scales(linear, tensors)
        table = tensors["weight.quant_map"]
        self._require_finite(f"{linear.name}.weight.quant_map", table)
        outputs, inputs = linear.out_features, linear.in_features
        count = outputs * inputs
        packed = tensors["weight"].contiguous().view(torch.uint8).reshape(-1)[: -(-count // 2)]
        size = min(blocks.size, count)
        if inputs % 2:
            codes = torch.stack((packed >> 4, packed & 15), 1).reshape(-1)[:count]
            values = table[codes.int()].mul_(absmax.repeat_interleave(size)[:count])
            return Dense(values.view(outputs, inputs))
        group = math.gcd(size, inputs)
        scales = absmax.repeat_interleave(size // group)[: count // group]
        return Codebook(
            codes=((packed >> 4) | (packed << 4)).view(outputs, inputs // 2),
            scales=scales.view(outputs, inputs // group),
            table=table,
            group=group,
        )

    def sketch(self, linear: LinearSpec, view: CheckpointView) -> WeightForm | None:
        """As ``to_form``: where rows have an odd number of inputs a byte holds elements of two of them, and the
        weight becomes ``Dense`` float32; where blocks run across row ends, scales are repeated."""
        stated = self.tensors(linear, view)
        if not stated:
            return None
        outputs, inputs = linear.out_features, linear.in_features
        if "SCB" in stated:
            return ChannelInt8(
                codes=torch.empty((outputs, inputs), dtype=torch.int8, device="meta"),
                scales=torch.empty(outputs, dtype=torch.float32, device="meta"),
                factor=PER_127,
            )
        if inputs % 2:
            return Dense(torch.empty((outputs, inputs), dtype=torch.float32, device="meta"))
        suffix = next(suffix for suffix in stated if suffix.startswith(STATE))
        blocks = self._state(linear, suffix, view.read(f"{linear.name}.{suffix}"))
        group = math.gcd(min(blocks.size, outputs * inputs), inputs)
        return Codebook(
            codes=torch.empty((outputs, inputs // 2), dtype=torch.uint8, device="meta"),
            scales=torch.empty((outputs, inputs // group), dtype=torch.float32, device="meta"),
            table=torch.empty(16, dtype=torch.float32, device="meta"),
            group=group,
        )

    def _int8_tensors(self, linear: LinearSpec) -> Mapping[str, TensorSpec]:
        shape = (linear.out_features, linear.in_features)
        by_outputs = linear.cut == "outputs"
        stated = {
            "weight": TensorSpec(shape=shape, dtype="int8", shard_dim=0 if by_outputs else 1),
            "SCB": TensorSpec(shape=shape[:1], dtype="float32", shard_dim=0 if by_outputs else None),
        }
        if self._states_layout:
            stated["weight_format"] = TensorSpec(shape=(), dtype="uint8")
        return stated

    def _int8(self, linear: LinearSpec, tensors: Mapping[str, torch.Tensor]) -> ChannelInt8:
        layout = tensors.get("weight_format")
        if layout is not None and int(layout) != 0:
            raise CheckpointError(
                f"{self._place(f'{linear.name}.weight_format')} should be 0 (row), found {int(layout)}: col32, turing and "
                "ampere are layouts of old GPUs; load the checkpoint with a bitsandbytes before 0.45 and save it as row"
            )
        scales = tensors["SCB"]
        self._require_finite(f"{linear.name}.SCB", scales, negative=False)
        return ChannelInt8(codes=tensors["weight"], scales=scales, factor=PER_127)

    def _packed_tensors(self, linear: LinearSpec, view: CheckpointView) -> Mapping[str, TensorSpec]:
        """What 4-bit weights are stored in; the number of scales is checked when the quant_state is read."""
        names, name = view.names(), f"{linear.name}.weight"
        kinds = [kind for kind in TYPES if f"{linear.name}.{STATE}{kind}" in names]
        if len(kinds) != 1:
            others = sorted(found for found in names if found.startswith(f"{name}.quant_state"))
            raise self._wrong(
                f"{linear.name}.{STATE}{self._kind if self._kind in TYPES else TYPES[0]}",
                f"exactly one quant_state, of {' or '.join(TYPES)}",
                ", ".join(others) or "no such tensor",
            )
        state = f"{STATE}{kinds[0]}"
        self._expect(kinds[0], f"{linear.name}.{state}")
        missing = [
            part
            for part in ("weight", "weight.absmax", "weight.quant_map")
            if f"{linear.name}.{part}" not in names
        ]
        if missing:
            raise self._wrong(
                f"{linear.name}.{missing[0]}", "a tensor of every 4-bit weight", "no such tensor"
            )
        self._refuse_repacked(f"{name}.absmax")
        stored, absmax, text = (
            view.info(name),
            view.info(f"{name}.absmax"),
            view.info(f"{linear.name}.{state}"),
        )
        size = math.prod(text.shape)
        if size > MAX_STATE_BYTES:
            raise self._wrong(
                f"{linear.name}.{state}", f"JSON of at most {MAX_STATE_BYTES} bytes", f"{size} bytes"
            )
        nested = absmax.dtype == "uint8" or f"{linear.name}.{NESTED[0]}" in names
        storage = stored.dtype if stored.dtype in STORAGES else STORAGES[0]
        dtype: torch.dtype = getattr(torch, storage)
        elements = -(-linear.out_features * linear.in_features // (2 * dtype.itemsize))
        stated = {
            "weight": TensorSpec(shape=(elements, 1), dtype=storage),
            "weight.absmax": TensorSpec(shape=absmax.shape, dtype="uint8" if nested else "float32"),
            "weight.quant_map": TensorSpec(shape=(16,), dtype="float32"),
            state: TensorSpec(shape=(size,), dtype="uint8"),
        }
        if nested:
            scales = f"{linear.name}.{NESTED[0]}"
            shape = view.info(scales).shape if scales in names else (-(-math.prod(absmax.shape) // 256),)
            stated[NESTED[0]] = TensorSpec(shape=(math.prod(shape),), dtype="float32")
            stated[NESTED[1]] = TensorSpec(shape=(256,), dtype="float32")
        return stated

    def _refuse_repacked(self, name: str) -> None:
        """bitsandbytes reorders weights in place at the first forward on some CPUs, and saves what cannot be read."""
        info = self._view.info(name)
        if len(info.shape) != 1 or info.dtype == "bfloat16":
            raise CheckpointError(
                f"{self._place(name)} should be float32 (or uint8) of one dimension, found {info.dtype} "
                f"{list(info.shape)}: bitsandbytes repacked the weights for a CPU with AVX512-BF16 before they were "
                "saved, which loses their order; quantize the model again and save it before its first forward"
            )

    def _scales(
        self, linear: LinearSpec, tensors: Mapping[str, torch.Tensor]
    ) -> tuple[_Blocks, torch.Tensor]:
        """(the blocks, float32 [blocks] of their scales)."""
        suffix = next(suffix for suffix in tensors if suffix.startswith(STATE))
        blocks = self._state(linear, suffix, tensors[suffix])
        absmax, name = tensors["weight.absmax"], f"{linear.name}.weight.absmax"
        expected = -(-linear.out_features * linear.in_features // blocks.size)
        if absmax.numel() != expected:
            raise self._wrong(name, f"{expected} scales of blocks of {blocks.size}", f"{absmax.numel()}")
        if NESTED[0] not in tensors:
            self._require_finite(name, absmax, negative=False)
            return blocks, absmax
        shared, table = (tensors[part] for part in NESTED)
        for part in NESTED:
            self._require_finite(f"{linear.name}.{part}", tensors[part])
        if blocks.nested_size == 0:
            raise self._wrong(
                f"{linear.name}.{suffix}",
                "nested_blocksize and nested_offset, as its scales are bytes",
                "neither",
            )
        if shared.numel() != -(-expected // blocks.nested_size):
            raise self._wrong(
                f"{linear.name}.{NESTED[0]}",
                f"{-(-expected // blocks.nested_size)} scales, each of {blocks.nested_size} of the {expected} blocks",
                f"{shared.numel()}",
            )
        scales = table[absmax.int()]
        scales.mul_(shared.repeat_interleave(min(blocks.nested_size, expected))[:expected])
        scales.add_(blocks.nested_offset)
        self._require_finite(name, scales)
        return blocks, scales

    def _state(self, linear: LinearSpec, suffix: str, data: torch.Tensor) -> _Blocks:
        """The JSON of a quant_state, checked against the matrix it belongs to."""
        name = f"{linear.name}.{suffix}"
        try:
            stated = json.loads(bytes(data.reshape(-1).tolist()).decode("utf-8"))
        except (ValueError, RecursionError) as error:
            raise self._wrong(name, "a JSON object in UTF-8", f"{error}") from error
        if not isinstance(stated, dict):
            raise self._wrong(name, "a JSON object", f"a {type(stated).__name__}")
        kind, shape = stated.get("quant_type"), stated.get("shape")
        if kind != suffix.removeprefix(STATE):
            raise self._wrong(name, f"quant_type {suffix.removeprefix(STATE)}", f"{kind!r:.80}")
        if shape != [linear.out_features, linear.in_features]:
            raise self._wrong(
                name,
                f"shape {[linear.out_features, linear.in_features]} by config.json",
                f"{shape!r:.80}",
            )
        size = self._count(name, "blocksize", stated)
        if stated.get("nested_blocksize") is None:
            return _Blocks(size=size)
        offset = stated.get("nested_offset")
        if not isinstance(offset, int | float) or not abs(offset) < LARGEST:
            raise self._wrong(name, "a finite nested_offset", f"{offset!r:.80}")
        return _Blocks(
            size=size, nested_size=self._count(name, "nested_blocksize", stated), nested_offset=float(offset)
        )

    def _count(self, name: str, key: str, stated: Mapping[str, Any]) -> int:
        value = stated.get(key)
        if type(value) is not int or value < 1:
            raise self._wrong(name, f"{key} of at least 1", f"{value!r:.80}")
        return value

    def _expect(self, kind: str, name: str) -> None:
        if self._kind not in (None, kind):
            raise self._wrong(name, f"{self._kind} by quantization_config", kind)

    def _require_finite(self, name: str, values: torch.Tensor, *, negative: bool = True) -> None:
        if not bool(values.isfinite().all()):
            raise self._wrong(name, "finite numbers", "NaN or infinity")
        if not negative and bool((values < 0).any()):
            raise self._wrong(name, "scales of at least 0", f"{float(values.min())}")

    def _wrong(self, name: str, expected: str, found: str) -> CheckpointError:
        return CheckpointError(f"{self._place(name)}: expected {expected}, found {found}; {AGAIN}")

    def _place(self, name: str) -> str:
        return f"{self._view.where(name)}: tensor {name!r}"
