"""Integers of 2 to 8 bits in int32 words, as compressed-tensors packs them; words are little-endian.

Value i of a row lies in one of two layouts, which differ only for 3, 5, 6 and 7 bits:

    stream  (0.19 and later)   bits [i * b, (i + 1) * b) of the row: a value may straddle two words
    padded  (before)           floor(32 / b) values a word, from its lowest bit on; the rest of the word is unused
"""

from __future__ import annotations

import torch


def words(count: int, bits: int, *, padded: bool) -> int:
    """int32 words that hold ``count`` values."""
    return -(-count // (32 // bits)) if padded else -(-count * bits // 32)


def in_bytes(packed: torch.Tensor) -> torch.Tensor:
    """packed int32 [rows, words] -> uint8 [rows, 4 words]; a view of it where it is contiguous."""
    flat = packed.reshape(-1)
    if flat.stride(0) != 1:  # a column of a rank's share, or one word of it
        flat = flat.clone(memory_format=torch.contiguous_format)
    return flat.view(torch.uint8).view(packed.shape[0], 4 * packed.shape[1])


def unpack(packed: torch.Tensor, count: int, bits: int, *, padded: bool) -> torch.Tensor:
    """packed int32 [rows, words] -> uint8 [rows, count] of 0 to 2**bits - 1; a view of ``packed`` where bits is 8."""
    if padded and 32 % bits:
        return _unpack_padded(packed, count, bits)
    stored = in_bytes(packed)
    if bits == 8:
        return stored[:, :count]
    rows, runs = packed.shape[0], -(-count // 8)  # eight values are ``bits`` bytes
    if stored.shape[1] < runs * bits:
        stored = torch.nn.functional.pad(stored, (0, runs * bits - stored.shape[1]))
    parts = stored[:, : runs * bits].reshape(rows, runs, bits)
    values = parts.new_empty((rows, runs, 8))
    for i in range(8):
        byte, shift = divmod(i * bits, 8)
        value = parts[:, :, byte] >> shift
        if shift + bits > 8:
            value |= parts[:, :, byte + 1] << (8 - shift)
        values[:, :, i] = value
    return values.view(rows, runs * 8)[:, :count].bitwise_and_(2**bits - 1)


def nibbles(codes: torch.Tensor) -> torch.Tensor:
    """codes uint8 [rows, 2 n] of 0 to 15 -> uint8 [rows, n], the even one in the low half."""
    return codes[:, 0::2].bitwise_or(codes[:, 1::2] << 4)


def _unpack_padded(packed: torch.Tensor, count: int, bits: int) -> torch.Tensor:
    in_word = 32 // bits
    values = torch.empty((*packed.shape, in_word), dtype=torch.uint8, device=packed.device)
    for i in range(in_word):
        values[:, :, i] = (packed >> (i * bits)) & (2**bits - 1)
    return values.flatten(1)[:, :count]
