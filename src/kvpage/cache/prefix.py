"""Names of cached blocks: a keyed hash chain over token ids; and how long a prefix the index holds."""

from __future__ import annotations

from array import array
from collections.abc import Container, Sequence
from hashlib import blake2b

DIGEST_SIZE = 16


class PrefixHasher:
    """Gives the digest of each full block of a sequence: keyed blake2b over parent digest and token ids.

    A digest names the block's tokens and all tokens before them. Without the key nobody can construct two
    prompts that collide, so a hit never shows one tenant another's cache.

    Args:
        key: up to 64 bytes.
        block_size: tokens a block.
    """

    __slots__ = ("_block_size", "_keyed")

    def __init__(self, key: bytes, block_size: int) -> None:
        self._keyed = blake2b(digest_size=DIGEST_SIZE, key=key)
        self._block_size = block_size

    def root(self, salt: str | None, adapter: str | None, group: int, kind: str) -> bytes:
        """Parent digest of a sequence's first block: what must be equal besides the tokens."""
        state = self._keyed.copy()
        for part in (salt, adapter, f"{group}:{kind}:{self._block_size}"):
            text = b"" if part is None else part.encode("utf-8", "surrogatepass")
            state.update(b"%d:%d:" % (part is not None, len(text)) + text)
        return state.digest()

    def extend(self, root: bytes, digests: list[bytes], token_ids: Sequence[int], blocks: int) -> None:
        """Lengthen ``digests`` until it names the first ``blocks`` blocks of ``token_ids``."""
        size, keyed = self._block_size, self._keyed
        parent = digests[-1] if digests else root
        for start in range(len(digests) * size, blocks * size, size):
            state = keyed.copy()
            state.update(parent + array("i", token_ids[start : start + size]).tobytes())
            parent = state.digest()
            digests.append(parent)


def full_hit(index: Container[bytes], digests: Sequence[bytes], limit: int) -> int:
    """Blocks of the longest cached prefix, at most ``limit``, where every token of it is needed."""
    for number in range(limit):
        if digests[number] not in index:
            return number
    return limit


def window_hit(index: Container[bytes], digests: Sequence[bytes], limit: int, reach: int, size: int) -> int:
    """The same where only the last ``reach`` tokens before the end of the hit are needed."""
    hit = number = limit
    while hit > 0:
        if number <= max(0, hit * size - reach) // size:
            return hit
        number -= 1
        if digests[number] not in index:
            hit = number
    return 0
