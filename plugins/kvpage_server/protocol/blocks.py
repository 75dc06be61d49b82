"""What /kvpage/blocks and /kvpage/plan answer."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field


class EngineCounts(BaseModel):
    """Counts of one moment, and of all time since the engine was made."""

    running: int = Field(description="sequences that hold a slot")
    waiting: int
    prompt_tokens: int
    generated_tokens: int
    finished_requests: int
    preemptions: int
    prefix_queries: int
    prefix_hits: int
    kv_usage: float = Field(description="share of the KV blocks in use, 0 to 1")


class GroupBlocks(BaseModel):
    """One KV group's pool."""

    index: int
    kind: str
    window: int | None
    total: int
    free: int
    used: int
    shared: int
    cached: int
    states: str = Field(
        description="runs of blocks from number 1 on: '3u1s2f'; f free, c cached, u used, s shared, a capital: "
        "held, and in the prefix index"
    )
    references: dict[str, int] = Field(description="block number -> holders, where there are several")
    filled: dict[str, int] = Field(description="block number -> tokens, where a held block is not full")


class SequenceBlocks(BaseModel):
    """One choice of a request."""

    request_id: str
    choice: int
    state: Literal["running", "waiting"]
    known: int = Field(description="tokens, prompt and generated")
    computed: int = Field(description="tokens whose K and V are in blocks")
    blocks: list[str] = Field(description="a KV group: block numbers in the order of the table, '1-3 7'")


class BlocksAnswer(BaseModel):
    """What every KV block holds at one moment."""

    version: str
    model: str
    time: float = Field(description="seconds of a clock that only goes forward")
    map_time: float = Field(description="when the block map was taken: large pools are looked at less often")
    engine: EngineCounts
    block_size: int
    groups: list[GroupBlocks]
    sequences: list[SequenceBlocks]


class PlanValue(BaseModel):
    """A value that the engine runs with."""

    name: str
    value: Any
    reason: str | None


class PlanAnswer(BaseModel):
    """Every value that the engine runs with, and why."""

    version: str
    model: str
    values: list[PlanValue]
    notes: list[str]
