"""What the block manager keeps: one group's pool, one sequence's tables, and their limits."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from kvpage.api.kv import BlockCopy
from kvpage.cache.pool import BlockPool
from kvpage.errors import ConfigError


@dataclass(frozen=True, slots=True)
class GroupConfig:
    """One KV group's pool.

    Attributes:
        kind: "full" keeps every token; "window" gives back the blocks that fell behind the window.
        num_blocks: dimension 0 of the group's KV tensors. It counts block 0, the null block, which no table
            is ever given: ``num_blocks - 1`` are usable.
        window: tokens a query sees, itself included (kind "window").
    """

    kind: Literal["full", "window"]
    num_blocks: int
    window: int | None = None


class TableEdits(Protocol):
    """Where changes of block tables are written: the matching fields of a ``StepPlan``."""

    table_slots: array[int]
    table_groups: array[int]
    table_indices: array[int]
    table_blocks: array[int]
    copies: list[BlockCopy]


@dataclass(slots=True, eq=False)
class BlockTables:
    """What one sequence holds.

    Attributes:
        tables: a group -> block numbers by position // block_size. 0 = behind the window. All have one length.
        roots: a group -> parent digest of the first block.
        digests: a group -> digests of the first full blocks, computed when first needed and kept.
        first: a group -> index of the first entry that is not behind the window.
        published: how many blocks were offered to the index.
    """

    tables: list[list[int]]
    roots: list[bytes]
    digests: list[list[bytes]]
    first: list[int]
    published: int = 0

    @property
    def num_blocks(self) -> int:
        """Entries of each table."""
        return len(self.tables[0])


@dataclass(frozen=True, slots=True)
class BlockState:
    """One block, for inspection."""

    references: int
    cached: bool


@dataclass(frozen=True, slots=True)
class GroupState:
    """One group's pool, for inspection: ``blocks[i]`` is block i, the null block included."""

    kind: str
    window: int | None
    blocks: list[BlockState] = field(repr=False)


class Group:
    """A pool and what its kind asks of it."""

    __slots__ = ("index", "kind", "pool", "reach", "window")

    def __init__(self, index: int, config: GroupConfig) -> None:
        self.index = index
        self.kind = config.kind
        self.window = config.window
        self.pool = BlockPool(config.num_blocks)
        self.reach = -1 if config.window is None else config.window - 1  # tokens before a query that it sees


def check_config(block_size: int, groups: Sequence[GroupConfig], key: bytes) -> None:
    """Raises ConfigError where a block manager cannot be made of these."""
    if not 1 <= len(key) <= 64:
        raise ConfigError(f"hash_key must have 1 to 64 bytes, got {len(key)}: leave it out for a random one")
    if block_size < 1:
        raise ConfigError(f"block_size must be at least 1, got {block_size}")
    if not groups:
        raise ConfigError("a model needs at least one KV group, got none")
    for group in groups:
        if group.num_blocks < 2:
            raise ConfigError(
                f"num_blocks must be at least 2 (one is the null block), got {group.num_blocks}: "
                "raise num_kv_blocks or kv_cache_memory"
            )
        if (group.kind == "window") != (group.window is not None) or (
            group.window is not None and group.window < 1
        ):
            raise ConfigError(f"a {group.kind!r} group cannot have window={group.window}")
