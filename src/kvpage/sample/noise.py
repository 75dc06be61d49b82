"""Counter-based noise: one uniform number a (seed, position, stream), the same in every implementation.

Philox4x32-10 of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011). The counter holds the
position of the token in its sequence and the stream (which choice of a request), the key holds the seed, so a
token's noise depends on nothing else: not on the batch, the slot, the step or an earlier draw. Known answers are
in ``tests/data/philox.json``.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Words: TypeAlias = "tuple[int, int, int, int]"
UInt64Array: TypeAlias = npt.NDArray[np.uint64]
Int64Array: TypeAlias = npt.NDArray[np.int64]
Float32Array: TypeAlias = npt.NDArray[np.float32]

ROUNDS = 10
LOW_WORD = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
UNIT = 2.0**-24  # 24 random bits: every uniform is exact in float32, and below 1

_SCALAR_LIMIT = 9  # below about this many rows the pure-Python version is faster than numpy's call overhead
_MULTIPLIERS = np.array(MULTIPLIERS, dtype=np.uint64)[:, None]
# What round i adds to the key, before reduction to 32 bits: [ROUNDS, 2, 1].
_KEY_SCHEDULE = (np.arange(ROUNDS, dtype=np.uint64)[:, None] * np.array(KEY_STEPS, dtype=np.uint64))[
    :, :, None
]
_LOW_WORD = np.full((1, 1), LOW_WORD, dtype=np.uint64)  # arrays: numpy converts a scalar anew in each call
_WORD = np.full((1, 1), 32, dtype=np.uint64)


def philox4x32_10(counter: Words, key: tuple[int, int]) -> Words:
    """Four 32-bit words of noise for a counter of four and a key of two 32-bit words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        product0 = c0 * 0xD2511F53
        product1 = c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (
            (product1 >> 32) ^ c1 ^ k0,
            product1 & LOW_WORD,
            (product0 >> 32) ^ c3 ^ k1,
            product0 & LOW_WORD,
        )
        k0 = (k0 + 0x9E3779B9) & LOW_WORD
        k1 = (k1 + 0xBB67AE85) & LOW_WORD
    return c0, c1, c2, c3


def uniform(seed: int, position: int, stream: int) -> float:
    """The uniform number in [0, 1) of one token, a multiple of 2**-24.

    Args:
        seed: 0 .. 2**64 - 1; its low word is the key's first.
        position: index of the token in its sequence (prompt included), 0 .. 2**64 - 1.
        stream: which choice of the request, 0 .. 2**32 - 1.
    """
    counter = (position & LOW_WORD, position >> 32, stream, 0)
    return (philox4x32_10(counter, (seed & LOW_WORD, seed >> 32))[0] >> 8) * UNIT


def uniforms(seeds: UInt64Array, positions: Int64Array, streams: Int64Array) -> Float32Array:
    """``uniform`` for N tokens at once, bit for bit the same: [N], [N], [N] -> float32 [N]."""
    count = len(seeds)
    if count <= _SCALAR_LIMIT:
        triples = zip(seeds.tolist(), positions.tolist(), streams.tolist(), strict=True)
        return np.array([uniform(*triple) for triple in triples], dtype=np.float32)
    # even = (c0, c2) and odd = (c1, c3), each [2, N]; 32-bit words in 64-bit lanes. Everything is done in place: for
    # few rows, numpy's calls and their temporaries are what takes time.
    even, odd, keys, product = np.empty((4, 2, count), dtype=np.uint64)
    swapped = product[::-1]
    np.bitwise_and(positions.view(np.uint64), _LOW_WORD[0], out=even[0])
    even[1] = streams
    np.right_shift(positions.view(np.uint64), _WORD[0], out=odd[0])
    odd[1] = 0
    np.bitwise_and(seeds, _LOW_WORD[0], out=keys[0])
    np.right_shift(seeds, _WORD[0], out=keys[1])
    for key in (keys + _KEY_SCHEDULE) & _LOW_WORD:
        np.multiply(even, _MULTIPLIERS, out=product)
        np.right_shift(swapped, _WORD, out=even)
        np.bitwise_xor(even, odd, out=even)
        np.bitwise_xor(even, key, out=even)
        np.bitwise_and(swapped, _LOW_WORD, out=odd)
    noise: Float32Array = (even[0] >> np.uint64(8)).astype(np.float32) * np.float32(UNIT)
    return noise
