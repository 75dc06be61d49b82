"""Bit streams of GPTQ: value i of a column has the bits [i * bits, (i + 1) * bits) of its int32 words, low ones first.

qweight's columns are outputs and its values inputs; seen from the side, qzeros' columns are groups and its values
outputs. Values of 3 bits straddle words and bytes.
"""

from __future__ import annotations

import math

import torch

ONE_IN_EVERY_FIELD = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}
VALUES_AT_ONCE = 2**21
"""Values in a buffer, so that what is worked on stays in the cache."""


def unpacked(words: torch.Tensor, bits: int) -> torch.Tensor:
    """int32 [n * bits / 32, columns] -> uint8 [n, columns]."""
    rows, columns = words.shape
    stream = _bytes(words).view(rows, columns, 4).permute(0, 2, 1)
    # So many bytes hold a whole number of values.
    size = math.lcm(bits, 8) // 8
    parts = stream.reshape(rows * 4 // size, size, columns)
    count = size * 8 // bits
    values = torch.empty((parts.shape[0], count, columns), dtype=torch.uint8, device=words.device)
    for index in range(count):
        byte, offset = divmod(index * bits, 8)
        value = parts[:, byte] >> offset
        if offset + bits > 8:
            value |= parts[:, byte + 1] << (8 - offset)
        values[:, index] = value.bitwise_and_(2**bits - 1)
    return values.view(-1, columns)


def weight_codes(qweight: torch.Tensor, bits: int, order: torch.Tensor | None) -> torch.Tensor:
    """int32 [in * bits / 32, out] -> the codes of ``GroupedInt``: uint8 [out, in / 2], or [out, in] of 8 bits.

    Codes of 2 and 3 bits are raised by ``raised_by(bits)``. order: int64 [in], the input of each column.
    """
    rows, outputs = qweight.shape
    if order is None and bits in (4, 8):
        # A column's words are its codes already.
        return _bytes(qweight.t()).view(outputs, -1)
    inputs = rows * 32 // bits
    width = inputs if bits == 8 else inputs // 2
    codes = torch.empty((outputs, width), dtype=torch.uint8, device=qweight.device)
    step = max(32, VALUES_AT_ONCE // inputs)
    for start in range(0, outputs, step):
        values = unpacked(qweight[:, start : start + step], bits)
        if order is not None:
            values = values.index_select(0, order)
        if bits != 8:
            values = (values[1::2] << 4).bitwise_or_(values[0::2]).add_(raised_by(bits) * 0x11)
        codes[start : start + step] = values.t()
    return codes


def raised_by(bits: int) -> int:
    """What is added to codes and zero points of fewer than 4 bits, so that half the codes lie below 8."""
    return 8 - 2 ** (bits - 1) if bits < 4 else 0


def zero_points(qzeros: torch.Tensor, bits: int, version: int) -> torch.Tensor:
    """int32 [groups, out * bits / 32] -> uint8 [out, groups].

    Version 1 stores them less one. gptqmodel takes one off the fields of a whole word at once, so that a zero point of
    0 borrows from the next field: adding to the whole word gives it back.
    """
    if version == 1 and bits in ONE_IN_EVERY_FIELD:
        qzeros = qzeros + ONE_IN_EVERY_FIELD[bits]
    zeros = unpacked(qzeros.t(), bits)
    if version == 1 and bits not in ONE_IN_EVERY_FIELD:
        zeros = zeros.add_(1).bitwise_and_(2**bits - 1)
    return zeros


def _bytes(words: torch.Tensor) -> torch.Tensor:
    """uint8, row after row. (``contiguous`` would leave a tensor of one row or column any strides.)"""
    return words.clone(memory_format=torch.contiguous_format).view(-1).view(torch.uint8)
