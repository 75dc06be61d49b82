"""Codes of AWQ's three layouts, as ``GroupedInt`` has them: uint8 [out, in / 2], an even input in the low half."""

from __future__ import annotations

import torch

BYTE_OUTPUTS = ((0, 2), (4, 6), (1, 3), (5, 7))
"""GEMM: the outputs, of a word's eight, in the low and the high half of each of its bytes."""

ROWS, STRIDE = 4, 64
"""GEMV-fast: outputs that share an int16, and inputs that lie together in it."""

VALUES_AT_ONCE = 2**21
"""Values in a buffer, so that what is worked on stays in the cache."""


def gemm_codes(qweight: torch.Tensor) -> torch.Tensor:
    """int32 [in, out / 8] -> uint8 [out, in / 2]; ``in`` is even."""
    inputs, words = qweight.shape
    codes = torch.empty((words, 8, inputs // 2), dtype=torch.uint8, device=qweight.device)
    step = max(8, VALUES_AT_ONCE // (8 * inputs))
    for start in range(0, words, step):
        taken = qweight[:, start : start + step]
        stored = _bytes(taken).view(inputs, -1, 4)
        even, odd = stored[0::2], stored[1::2]
        low = (even & 15).bitwise_or_(odd << 4).permute(2, 1, 0)
        high = (even >> 4).bitwise_or_(odd & 0xF0).permute(2, 1, 0)
        for byte, (first, second) in enumerate(BYTE_OUTPUTS):
            codes[start : start + step, first] = low[byte]
            codes[start : start + step, second] = high[byte]
    return codes.view(words * 8, inputs // 2)


def gemm_zeros(qzeros: torch.Tensor) -> torch.Tensor:
    """int32 [groups, out / 8] -> uint8 [out, groups]."""
    groups, words = qzeros.shape
    stored = _bytes(qzeros).view(groups, words, 4).permute(1, 2, 0)
    zeros = torch.empty((words, 8, groups), dtype=torch.uint8, device=qzeros.device)
    for byte, (first, second) in enumerate(BYTE_OUTPUTS):
        zeros[:, first] = stored[:, byte] & 15
        zeros[:, second] = stored[:, byte] >> 4
    return zeros.view(words * 8, groups)


def gemv_codes(qweight: torch.Tensor) -> torch.Tensor:
    """int32 [out, in / 8] -> uint8 [out, in / 2]: its bytes."""
    return _bytes(qweight).view(qweight.shape[0], -1)


def gemv_zeros(qzeros: torch.Tensor, groups: int) -> torch.Tensor:
    """int32 [out, words] -> uint8 [out, groups]; what the words hold beyond is padding."""
    stored = _bytes(qzeros).view(qzeros.shape[0], -1)
    return torch.stack((stored & 15, stored >> 4), 2).flatten(1)[:, :groups].contiguous()


def gemv_fast_codes(qweight: torch.Tensor) -> torch.Tensor:
    """int16 [out / 4, in] -> uint8 [out, in / 2].

    Of each run of 64 inputs, int16 number 16 * r + c has in its nibbles the values 4 * c to 4 * c + 3 of output r of
    four. Among 32 values of an output, eight after another are the inputs
    2p, 2p + 8, 2p + 16, 2p + 24, 2p + 1, 2p + 9, 2p + 17, 2p + 25, for p of 0 to 3.
    """
    quads, inputs = qweight.shape
    codes = torch.empty((quads * ROWS, inputs // 2), dtype=torch.uint8, device=qweight.device)
    step = max(1, VALUES_AT_ONCE // (ROWS * inputs))
    for start in range(0, quads, step):
        taken = qweight[start : start + step]
        count = taken.shape[0]
        # [quad, run, output, 32 of the run, p, second input of a pair, 2 bytes of 2 inputs 8 apart]
        parts = _bytes(taken).view(count, inputs // STRIDE, ROWS, 2, 4, 2, 2)
        even, odd = parts[..., 0, :], parts[..., 1, :]
        pairs = torch.stack(((even & 15) | (odd << 4), (even >> 4) | (odd & 0xF0)), -1)
        # [quad, output, run, 32 of the run, 4 inputs 8 apart, p]
        ordered = pairs.flatten(-2).permute(0, 2, 1, 3, 5, 4)
        codes[start * ROWS : (start + count) * ROWS] = ordered.reshape(count * ROWS, inputs // 2)
    return codes


def _bytes(words: torch.Tensor) -> torch.Tensor:
    """uint8, row after row. (``contiguous`` would leave a tensor of one row or column any strides.)"""
    return words.clone(memory_format=torch.contiguous_format).view(-1).view(torch.uint8)
