"""GGUF's blocks as kvpage's forms, exactly: the float32 products are ggml's, in ggml's order.

A block holds 32 weights and a scale, or (the K-quants) 256 weights, whose small scales share one or two numbers. The
layouts are those of ggml's ggml-common.h; in the comments q is the code of a weight.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import torch

from kvpage import CheckpointError
from kvpage.api.quant import (
    CheckpointView,
    Codebook,
    GroupedInt,
    LinearSpec,
    QuantScheme,
    TensorSpec,
    WeightForm,
)
from kvpage_gguf.architectures import BLOCK_TYPES

BYTES_AT_ONCE = 2**18
"""Of blocks that are worked on together, so that all steps find them in the cache."""

IQ4_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
"""What the codes of IQ4_NL and IQ4_XS stand for."""

Parts = dict[str, torch.Tensor]


class _Kind(NamedTuple):
    """How one type of block becomes a form.

    ``parts``: uint8 [blocks, bytes] -> fields of the form, each [blocks, ...]. ``zero`` is ``None`` for a code book.
    """

    parts: Callable[[torch.Tensor], Parts]
    bits: int
    group: int
    zero: int | None


class GGUFScheme(QuantScheme):
    """Matrices whose tensor is called by a type of block: "MODULE.q4_k", uint8 [out, bytes a row]."""

    quantizes_tables: ClassVar[bool] = True

    @classmethod
    def from_checkpoint(cls, config: Mapping[str, Any], view: CheckpointView) -> GGUFScheme:
        method = config.get("quant_method", "gguf")
        if method != "gguf":
            raise CheckpointError(f"quantization_config states quant_method {method!r:.80}, expected 'gguf'")
        return cls()

    def tensors(self, linear: LinearSpec, view: CheckpointView) -> Mapping[str, TensorSpec]:
        names = view.names()
        found = [name for name in SIZES if f"{linear.name}.{name}" in names]
        if not found and f"{linear.name}.weight" in names:
            return {}
        if not found:
            raise CheckpointError(
                f"{view.where(linear.name)}: the tensor of {linear.name!r}, {linear.out_features} x "
                f"{linear.in_features}, is missing; the file is incomplete, or of another architecture than it states"
            )
        if len(found) > 1:
            raise CheckpointError(
                f"{view.where(linear.name)}: {linear.name!r} is stored as {' and as '.join(found)}; it must be once"
            )
        block, size = SIZES[found[0]]
        if linear.in_features % block:
            raise CheckpointError(
                f"{view.where(linear.name)}: {linear.name!r} has {linear.in_features} inputs by the config, which blocks "
                f"of {block} ({found[0]}) do not divide"
            )
        shape = (linear.out_features, linear.in_features // block * size)
        return {
            found[0]: TensorSpec(shape=shape, dtype="uint8", shard_dim=0 if linear.cut == "outputs" else None)
        }

    def to_form(self, linear: LinearSpec, tensors: Mapping[str, torch.Tensor]) -> WeightForm:
        ((name, stored),) = tensors.items()
        kind, (_, size) = KINDS[name], SIZES[name]
        rows = stored.shape[0]
        parts = _in_steps(kind.parts, stored.reshape(-1, size))
        fields = {key: tensor.view(rows, -1) for key, tensor in parts.items()}
        for key, tensor in fields.items():
            if tensor.is_floating_point() and not tensor.is_meta and not bool(tensor.isfinite().all()):
                output = int((~tensor.isfinite()).any(1).nonzero()[0])
                raise CheckpointError(
                    f"the weight of {linear.name!r} ({name}) has {key} that are not finite, first in output {output}; "
                    "download the file again"
                )
        if kind.zero is None:
            table = torch.tensor(IQ4_VALUES, dtype=torch.float32, device=stored.device)
            return Codebook(**fields, table=table, group=kind.group)
        activation: Any = "per-group" if kind.bits == 4 else "none"
        return GroupedInt(**fields, group=kind.group, bits=kind.bits, zero=kind.zero, activation=activation)


def _in_steps(parts: Callable[[torch.Tensor], Parts], blocks: torch.Tensor) -> Parts:
    """``parts`` of all blocks, some at a time."""
    count, size = blocks.shape
    step = count if blocks.is_meta else max(1, BYTES_AT_ONCE // size)
    whole: Parts = {}
    for start in range(0, count, step):
        for key, tensor in parts(blocks[start : start + step]).items():
            if key not in whole:
                whole[key] = tensor.new_empty((count, *tensor.shape[1:]))
            whole[key][start : start + step] = tensor
    return whole


def _halves(blocks: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    """float16 [blocks, n] of the bytes [start, stop)."""
    return blocks[:, start:stop].contiguous().view(torch.float16)


def _nibbles(stored: torch.Tensor) -> torch.Tensor:
    """uint8 [..., n] of which low halves come first and high ones after -> [..., n] of neighbours, the first low."""
    pairs = stored.contiguous().view(torch.int16)  # little-endian: the first byte is the low one
    low = (pairs & 15) | ((pairs >> 4) & 0xF0)
    high = ((pairs >> 4) & 15) | ((pairs >> 8) & 0xF0)
    return torch.cat((low.to(torch.uint8), high.to(torch.uint8)), -1)


def _paired(codes: torch.Tensor) -> torch.Tensor:
    """uint8 [..., 2n] below 16 -> [..., n], an even one in the low half."""
    pairs = codes.contiguous().view(torch.int16)
    return (pairs | (pairs >> 4)).to(torch.uint8)


def _fields(stored: torch.Tensor, width: int, count: int) -> torch.Tensor:
    """uint8 [..., n] -> [..., count, n]: the fields of ``width`` bits of each byte, the lowest first."""
    mask = (1 << width) - 1
    return torch.stack([(stored >> (width * index)) & mask for index in range(count)], -2)


def _six_bits(stored: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """uint8 [blocks, 12] -> scales and offsets, 6 bits each, uint8 [blocks, 8] (Q4_K, Q5_K)."""
    first, second, rest = stored[:, :4], stored[:, 4:8], stored[:, 8:]
    scales = torch.cat((first & 63, (rest & 15) | ((first >> 6) << 4)), 1)
    offsets = torch.cat((second & 63, (rest >> 4) | ((second >> 6) << 4)), 1)
    return scales, offsets


def _q4_0(blocks: torch.Tensor) -> Parts:
    """d * (q - 8). float16 d; 16 bytes of q."""
    return {"scales": _halves(blocks, 0, 2), "codes": _nibbles(blocks[:, 2:])}


def _q4_1(blocks: torch.Tensor) -> Parts:
    """d * q + m. float16 d, m; 16 bytes of q."""
    return {
        "scales": _halves(blocks, 0, 2),
        "offsets": _halves(blocks, 2, 4),
        "codes": _nibbles(blocks[:, 4:]),
    }


def _five_bits(stored: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """16 bytes of low halves, 4 bytes with a high bit for each of the 32 weights."""
    bits = _fields(high, 1, 8).transpose(1, 2).reshape(-1, 32)
    return _fields(stored, 4, 2).reshape(-1, 32) | (bits << 4)


def _q5_0(blocks: torch.Tensor) -> Parts:
    """d * (q - 16). float16 d; 4 bytes of high bits; 16 bytes of low ones."""
    return {"scales": _halves(blocks, 0, 2), "codes": _five_bits(blocks[:, 6:], blocks[:, 2:6])}


def _q5_1(blocks: torch.Tensor) -> Parts:
    """d * q + m. float16 d, m; 4 bytes of high bits; 16 bytes of low ones."""
    return {
        "scales": _halves(blocks, 0, 2),
        "offsets": _halves(blocks, 2, 4),
        "codes": _five_bits(blocks[:, 8:], blocks[:, 4:8]),
    }


def _q8_0(blocks: torch.Tensor) -> Parts:
    """d * q, q signed: held as q + 128. float16 d; 32 bytes of q."""
    return {"scales": _halves(blocks, 0, 2), "codes": blocks[:, 2:] ^ 128}


def _q2_k(blocks: torch.Tensor) -> Parts:
    """d * scale * q - dmin * offset for 16 weights: 16 bytes of both in 4 bits, 64 bytes of q, float16 d, dmin."""
    codes = _fields(blocks[:, 16:80].reshape(-1, 2, 32), 2, 4).reshape(-1, 256)
    return {
        "scales": blocks[:, :16] & 15,
        "offsets": blocks[:, :16] >> 4,
        "super_scales": _halves(blocks, 80, 82),
        "super_offsets": -_halves(blocks, 82, 84),
        "codes": _paired(codes),
    }


def _q3_k(blocks: torch.Tensor) -> Parts:
    """d * (scale - 32) * (q - 4) for 16 weights: 32 bytes of high bits, 64 of low ones, 12 of scales, float16 d."""
    low = _fields(blocks[:, 32:96].reshape(-1, 2, 32), 2, 4).reshape(-1, 256)
    high = _fields(blocks[:, :32], 1, 8).reshape(-1, 256)
    lower = _fields(blocks[:, 96:104], 4, 2).reshape(-1, 16)
    upper = _fields(blocks[:, 104:108], 2, 4).reshape(-1, 16)
    return {
        "scales": (lower | (upper << 4)).view(torch.int8) - 32,
        "super_scales": _halves(blocks, 108, 110),
        "codes": _paired(low | (high << 2)),
    }


def _q4_k(blocks: torch.Tensor) -> Parts:
    """d * scale * q - dmin * offset for 32 weights: float16 d, dmin; 12 bytes of scales; 128 of q, 64 weights in 32."""
    scales, offsets = _six_bits(blocks[:, 4:16])
    return {
        "scales": scales,
        "offsets": offsets,
        "super_scales": _halves(blocks, 0, 2),
        "super_offsets": -_halves(blocks, 2, 4),
        "codes": _nibbles(blocks[:, 16:].reshape(-1, 4, 32)),
    }


def _q5_k(blocks: torch.Tensor) -> Parts:
    """As Q4_K, with 32 bytes of high bits before the low ones."""
    scales, offsets = _six_bits(blocks[:, 4:16])
    low = _fields(blocks[:, 48:].reshape(-1, 4, 32), 4, 2).reshape(-1, 8, 32)
    return {
        "scales": scales,
        "offsets": offsets,
        "super_scales": _halves(blocks, 0, 2),
        "super_offsets": -_halves(blocks, 2, 4),
        "codes": low | (_fields(blocks[:, 16:48], 1, 8) << 4),
    }


def _q6_k(blocks: torch.Tensor) -> Parts:
    """d * scale * (q - 32) for 16 weights: 128 bytes of 4 low bits, 64 of 2 high ones, 16 signed scales, float16 d."""
    low = _fields(blocks[:, :128].reshape(-1, 2, 64), 4, 2).reshape(-1, 2, 4, 32)
    high = _fields(blocks[:, 128:192].reshape(-1, 2, 32), 2, 4)
    return {
        "scales": blocks[:, 192:208].contiguous().view(torch.int8),
        "super_scales": _halves(blocks, 208, 210),
        "codes": low | (high << 4),
    }


def _iq4_xs(blocks: torch.Tensor) -> Parts:
    """d * (scale - 32) * table[q] for 32 weights: float16 d; 2 bytes of high, 4 of low bits of scales; 128 of q."""
    high = _fields(blocks[:, 2:4], 2, 4).transpose(1, 2).reshape(-1, 8)
    low = _fields(blocks[:, 4:8], 4, 2).transpose(1, 2).reshape(-1, 8)
    scales = (low | (high << 4)).view(torch.int8) - 32
    return {
        "scales": _halves(blocks, 0, 2).float() * scales.float(),
        "codes": _nibbles(blocks[:, 8:].reshape(-1, 8, 16)),
    }


SIZES: Mapping[str, tuple[int, int]] = {
    name.lower(): (block, size) for name, block, size in BLOCK_TYPES.values()
}
"""Suffix of a tensor -> (weights in a block, bytes of a block)."""

KINDS: Mapping[str, _Kind] = {
    "q4_0": _Kind(_q4_0, 4, 32, 8),
    "q4_1": _Kind(_q4_1, 4, 32, 0),
    "q5_0": _Kind(_q5_0, 8, 32, 16),
    "q5_1": _Kind(_q5_1, 8, 32, 0),
    "q8_0": _Kind(_q8_0, 8, 32, 128),
    "q2_k": _Kind(_q2_k, 4, 16, 0),
    "q3_k": _Kind(_q3_k, 4, 16, 4),
    "q4_k": _Kind(_q4_k, 4, 32, 0),
    "q5_k": _Kind(_q5_k, 8, 32, 0),
    "q6_k": _Kind(_q6_k, 8, 16, 32),
    "iq4_nl": _Kind(_q4_0, 4, 32, None),
    "iq4_xs": _Kind(_iq4_xs, 4, 32, None),
}
