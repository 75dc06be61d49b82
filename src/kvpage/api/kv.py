"""How KV memory is laid out and moved."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

if TYPE_CHECKING:
    import torch

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


class KVConnector(ABC):
    """Moves blocks out of an engine's cache and back (to the host, a disk, another engine).

    Provisional: it may change until the first one lands. Blocks are named by their digest, the engine's name for
    a block's tokens and all before them.
    """

    @abstractmethod
    def match(self, digests: Sequence[bytes]) -> int:
        """How many of the leading blocks it can give back."""

    @abstractmethod
    def load(self, digest: bytes, group: int, layer: int) -> torch.Tensor:
        """One layer's block, of the KV tensor's shape without dimension 0."""

    @abstractmethod
    def store(self, digest: bytes, group: int, layer: int, block: torch.Tensor) -> None:
        """Keep one layer's block; ``block`` is valid during the call."""
