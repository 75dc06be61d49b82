"""How blocks are shared among the KV groups of a model with windows: a pool that is small still serves its longest."""

from __future__ import annotations

from dataclasses import replace

import pytest

from kvpage.config import (
    EngineOptions,
    GroupFacts,
    MachineFacts,
    ModelFacts,
    Resolved,
    blocks_per_sequence,
    resolve,
)

FULL, WINDOW = GroupFacts(elements_per_token=64), GroupFacts(elements_per_token=64, window=64)
MODEL = ModelFacts(context=8192, dtype="float32", groups=[WINDOW, FULL])
MACHINE = MachineFacts(device="cpu", available=2**34, total=2**34)
OPTIONS = EngineOptions(block_size=16, max_num_batched_tokens=64)


def sized(**options: object) -> Resolved:
    return resolve(replace(OPTIONS, **options), MODEL, MACHINE)


def needs(length: int) -> tuple[int, ...]:
    return tuple(blocks_per_sequence(group, 16, length, 64) for group in MODEL.groups)


@pytest.mark.parametrize("blocks", [1, 2, 5, 17, 64, 500])
def test_a_small_number_of_blocks_serves_the_longest_sequence_that_the_full_group_holds(blocks: int) -> None:
    found = sized(num_kv_blocks=blocks)
    assert found.num_blocks[1] == blocks
    assert found.num_blocks[0] >= needs(blocks * 16)[0]
    assert f"holds {blocks * 16} tokens of one sequence" in found.notes[-1]


@pytest.mark.parametrize("memory", [100_000, 300_000, 1_000_000])
def test_little_memory_is_shared_so_that_one_sequence_is_as_long_as_it_can_be(memory: int) -> None:
    found = sized(kv_cache_memory=memory)
    held = found.num_blocks[1] * 16
    assert found.kv_bytes <= memory
    assert all(have >= need for have, need in zip(found.num_blocks, needs(held), strict=True))
    block = 16 * 64 * 4
    longer = sum(need + 1 for need in needs(held + 16)) * block
    assert longer > memory, "a longer sequence would have fitted"


def test_plenty_of_blocks_is_shared_in_proportion() -> None:
    found = sized(num_kv_blocks=5120)
    assert found.num_blocks == (10 * needs(8192)[0], 5120)
    assert found.notes == ()
