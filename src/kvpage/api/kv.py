"""How KV memory is laid out and moved."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

KVKind: TypeAlias = Literal["full", "window", "latent", "state"]


@dataclass(frozen=True, kw_only=True, slots=True)
class KVGroupSpec:
    """Layers whose KV cache has one shape and one lifetime; each group has its own pool and block tables.

    Attributes:
        kind: "full" keeps every token; "window" frees the blocks that fell behind the window; "latent" (MLA)
            and "state" (recurrent) keep their place for later.
        layers: decoder layers of the group, in order; position in this tuple = index of the layer's KV tensor.
        num_kv_heads: K/V heads a layer on this rank. head_dim, v_head_dim: elements a head of K, of V.
        window: tokens a query sees, itself included (kind "window").
    """

    kind: KVKind
    layers: tuple[int, ...]
    num_kv_heads: int
    head_dim: int
    v_head_dim: int
    window: int | None = None

    def bytes_per_token(self, element_size: int) -> int:
        """Bytes one token takes in all layers of the group (K and V)."""
        return len(self.layers) * self.num_kv_heads * (self.head_dim + self.v_head_dim) * element_size


@dataclass(frozen=True, kw_only=True, slots=True)
class KVLayout:
    """What a backend wants one layer's KV tensor to be; dimension 0 is the block.

    Attributes:
        shape: with the number of blocks as its first entry.
        dtype: torch dtype name ("float32", "bfloat16", ...).
    """

    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, slots=True)
class BlockCopy:
    """Copy one block of every layer of a KV group (copy-on-write)."""

    group: int
    source: int
    target: int
