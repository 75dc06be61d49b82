"""Tables over the pools: prefix hits, copy-on-write, windows, all groups or none."""

from __future__ import annotations

import pytest

from kvpage.api.kv import BlockCopy
from kvpage.cache.manager import BlockManager
from kvpage.cache.tables import BlockTables, GroupConfig
from kvpage.errors import ConfigError
from kvpage.sched.plan import StepPlan

SIZE = 4


def full(num_blocks: int = 20) -> BlockManager:
    return BlockManager(block_size=SIZE, groups=[GroupConfig("full", num_blocks)])


def admitted(
    blocks: BlockManager, tokens: list[int], salt: str | None = None, slot: int = 0, publish: bool = True
) -> tuple[BlockTables, int]:
    """A sequence whose tokens are all computed, and how many of them were hits."""
    holder = blocks.open(salt)
    hit = blocks.match(holder, tokens)
    assert blocks.admit(holder, slot, len(tokens), hit, len(tokens) - hit, StepPlan(0))
    if publish:
        blocks.publish(holder, tokens, len(tokens))
    return holder, hit


def test_a_second_sequence_shares_the_full_blocks_of_a_common_prefix() -> None:
    blocks = full()
    first, _ = admitted(blocks, list(range(10)))
    second, hit = admitted(blocks, [*range(8), 77, 78])
    assert hit == 8
    assert second.tables[0][:2] == first.tables[0][:2]
    assert blocks.used_blocks == 4
    assert (blocks.hits, blocks.queries) == (8, 20)
    blocks.check()


def test_a_hit_leaves_the_last_token_to_compute() -> None:
    blocks = full()
    admitted(blocks, list(range(8)))
    assert blocks.match(blocks.open(), list(range(8))) == 4
    assert blocks.match(blocks.open(), list(range(9))) == 8


def test_one_tenant_never_hits_what_another_computed() -> None:
    blocks = full()
    admitted(blocks, list(range(9)), salt="a")
    assert blocks.match(blocks.open("b"), list(range(9))) == 0
    assert blocks.match(blocks.open(None), list(range(9))) == 0
    assert blocks.match(blocks.open("a"), list(range(9))) == 8


def test_without_prefix_caching_nothing_is_hit() -> None:
    blocks = BlockManager(block_size=SIZE, groups=[GroupConfig("full", 20)], enable_prefix_caching=False)
    admitted(blocks, list(range(9)))
    assert blocks.match(blocks.open(), list(range(9))) == 0
    assert blocks.cached_blocks == 0


def test_the_end_of_a_freed_sequence_is_evicted_before_its_beginning() -> None:
    blocks = full(num_blocks=4)
    holder, _ = admitted(blocks, list(range(12)))
    blocks.free(holder)
    assert blocks.free_blocks == 3
    admitted(blocks, [50, 51], publish=False)
    assert blocks.match(blocks.open(), list(range(13))) == 8
    blocks.check()


def test_an_allocation_may_take_every_unreferenced_cached_block() -> None:
    blocks = full(num_blocks=4)
    holder, _ = admitted(blocks, list(range(12)))
    blocks.free(holder)
    assert (blocks.free_blocks, blocks.used_blocks, blocks.cached_blocks) == (3, 0, 3)
    admitted(blocks, list(range(100, 112)), publish=False)
    assert (blocks.free_blocks, blocks.used_blocks, blocks.cached_blocks) == (0, 3, 0)


def test_too_few_blocks_change_nothing() -> None:
    blocks = full(num_blocks=4)
    holder, _ = admitted(blocks, list(range(8)))
    waiting = blocks.open()
    plan = StepPlan(0)
    assert not blocks.admit(waiting, 1, 5, 0, 5, plan)
    assert not blocks.allocate(holder, 0, 8, 9, plan)
    assert len(plan.table_blocks) == 0
    assert blocks.free_blocks == 1
    blocks.check()


def test_hits_that_are_free_are_not_counted_twice() -> None:
    blocks = full(num_blocks=4)
    holder, _ = admitted(blocks, list(range(8)))
    blocks.free(holder)
    tokens = [*range(8), *range(100, 108)]
    follower = blocks.open()
    assert blocks.match(follower, tokens) == 8
    assert not blocks.admit(follower, 0, 16, 8, 8, StepPlan(0))  # 2 hits + 2 new of 3
    blocks.check()


def test_all_but_the_last_writer_of_a_shared_block_get_a_copy() -> None:
    blocks = full()
    parent, _ = admitted(blocks, list(range(6)))
    children = [blocks.fork(parent, slot, StepPlan(0)) for slot in (1, 2, 3)]
    assert blocks.used_blocks == 2
    shared = parent.tables[0][1]
    plan = StepPlan(1)
    for slot, holder in enumerate([parent, *children]):
        assert blocks.allocate(holder, slot, 6, 1, plan)
    blocks.drop_copy_sources()
    assert [copy.source for copy in plan.copies] == [shared] * 3
    assert (blocks.copies, blocks.forks) == (3, 3)
    assert children[2].tables[0][1] == shared
    assert len({holder.tables[0][1] for holder in [parent, *children]}) == 4
    assert len({holder.tables[0][0] for holder in [parent, *children]}) == 1
    assert list(zip(plan.table_slots, plan.table_indices, plan.table_blocks, strict=True)) == [
        (slot, 1, holder.tables[0][1]) for slot, holder in enumerate([parent, *children[:2]])
    ]
    blocks.check()


def test_a_fork_at_a_block_boundary_copies_nothing() -> None:
    blocks = full()
    parent, _ = admitted(blocks, list(range(8)))
    child = blocks.fork(parent, 1, StepPlan(0))
    plan = StepPlan(1)
    assert blocks.allocate(parent, 0, 8, 1, plan)
    assert blocks.allocate(child, 1, 8, 1, plan)
    assert plan.copies == []


def test_the_source_of_a_copy_is_not_reused_within_the_same_plan() -> None:
    blocks = full(num_blocks=4)
    parent, _ = admitted(blocks, list(range(6)))
    child = blocks.fork(parent, 1, StepPlan(0))
    source = parent.tables[0][1]
    plan = StepPlan(1)
    assert blocks.allocate(parent, 0, 6, 1, plan)
    assert plan.copies == [BlockCopy(0, source, parent.tables[0][1])]
    blocks.free(child)  # preempted in the same plan
    assert blocks.free_blocks == 0
    blocks.drop_copy_sources()
    assert blocks.free_blocks == 1
    blocks.check()


def window(num_blocks: int = 20, width: int = 6) -> BlockManager:
    return BlockManager(block_size=SIZE, groups=[GroupConfig("window", num_blocks, width)])


def test_blocks_behind_the_window_are_given_back_and_marked_in_the_table() -> None:
    blocks = window()
    holder, _ = admitted(blocks, list(range(12)))
    plan = StepPlan(0)
    assert blocks.allocate(holder, 7, 12, 1, plan)  # position 12 sees 7 .. 12
    assert holder.tables[0][0] == 0
    assert all(holder.tables[0][1:])
    assert (7, 0, 0) in list(zip(plan.table_slots, plan.table_indices, plan.table_blocks, strict=True))
    assert blocks.used_blocks == 3
    blocks.check()


def test_a_window_sequence_grows_without_end_in_a_small_pool() -> None:
    blocks = window(num_blocks=4)
    assert blocks.capacity is None
    holder, _ = admitted(blocks, [0, 1])
    for position in range(2, 100):
        assert blocks.allocate(holder, 0, position, 1, StepPlan(position))
        blocks.check()


def test_a_window_hit_takes_only_the_blocks_in_sight() -> None:
    blocks = window()
    tokens = list(range(16))
    first, _ = admitted(blocks, tokens)
    second, hit = admitted(blocks, [*tokens, 16])
    assert hit == 16
    assert second.tables[0] == [0, 0, *first.tables[0][2:], second.tables[0][4]]
    blocks.check()


def test_a_mixed_model_hits_as_far_as_all_groups_can() -> None:
    blocks = BlockManager(block_size=SIZE, groups=[GroupConfig("full", 20), GroupConfig("window", 8, 6)])
    tokens = list(range(17))
    holder, _ = admitted(blocks, tokens)
    blocks.free(holder)
    assert blocks.match(blocks.open(), tokens) == 16
    blocks.pools[1].withdraw(blocks.pools[1].index[holder.digests[1][2]])
    assert blocks.match(blocks.open(), tokens) == 8
    blocks.pools[0].withdraw(blocks.pools[0].index[holder.digests[0][1]])
    assert blocks.match(blocks.open(), tokens) == 4
    blocks.check()


def test_a_group_that_is_full_keeps_the_others_untouched() -> None:
    blocks = BlockManager(block_size=SIZE, groups=[GroupConfig("full", 20), GroupConfig("full", 3)])
    assert not blocks.admit(blocks.open(), 0, 12, 0, 12, StepPlan(0))
    assert blocks.used_blocks == 0


def test_rollback_gives_back_what_rejected_drafts_took() -> None:
    blocks = full()
    tokens = list(range(11))
    holder, _ = admitted(blocks, tokens)
    blocks.rollback(holder, 6)
    assert holder.num_blocks == 2
    assert blocks.used_blocks == 2
    assert blocks.match(blocks.open(), tokens) == 4  # the block of position 6 will be written again
    blocks.check()
    assert blocks.allocate(holder, 0, 6, 3, StepPlan(0))
    assert holder.num_blocks == 3


def test_withdrawn_blocks_are_not_hit() -> None:
    blocks = full()
    tokens = list(range(9))
    holder = blocks.open()
    assert blocks.admit(holder, 0, 9, 0, 9, StepPlan(0))
    journal: list[tuple[int, int]] = []
    blocks.publish(holder, tokens, 9, journal)
    assert blocks.match(blocks.open(), tokens) == 8
    blocks.withdraw(journal)
    assert blocks.match(blocks.open(), tokens) == 0
    blocks.check()


def test_the_cache_is_reset_only_while_nobody_holds_blocks() -> None:
    blocks = full()
    holder, _ = admitted(blocks, list(range(9)))
    assert not blocks.reset_prefix_cache()
    assert blocks.cached_blocks == 2
    blocks.free(holder)
    assert blocks.reset_prefix_cache()
    assert (blocks.cached_blocks, blocks.free_blocks) == (0, 19)


def test_a_snapshot_tells_of_every_block_how_many_hold_it_and_whether_it_is_cached() -> None:
    blocks = full(num_blocks=5)
    holder, _ = admitted(blocks, list(range(6)))
    blocks.fork(holder, 1, StepPlan(0))
    (group,) = blocks.snapshot()
    assert [(block.references, block.cached) for block in group.blocks] == [
        (0, False),
        (2, True),
        (2, False),
        (0, False),
        (0, False),
    ]


def test_check_notices_a_block_that_was_released_behind_a_table() -> None:
    blocks = full()
    holder, _ = admitted(blocks, list(range(6)))
    blocks.pools[0].release(holder.tables[0][1])
    with pytest.raises(AssertionError, match="references"):
        blocks.check()


@pytest.mark.parametrize(
    ("size", "groups"),
    [
        (0, [GroupConfig("full", 4)]),
        (4, []),
        (4, [GroupConfig("full", 1)]),
        (4, [GroupConfig("full", 4, 8)]),
        (4, [GroupConfig("window", 4)]),
        (4, [GroupConfig("window", 4, 0)]),
    ],
)
def test_impossible_sizes_are_refused(size: int, groups: list[GroupConfig]) -> None:
    with pytest.raises(ConfigError):
        BlockManager(block_size=size, groups=groups)


def test_equal_keys_give_equal_digests_and_a_key_of_no_use_is_refused() -> None:
    def digest(key: bytes | None) -> bytes:
        blocks = BlockManager(block_size=SIZE, groups=[GroupConfig("full", 4)], hash_key=key)
        return admitted(blocks, list(range(4)))[0].digests[0][0]

    assert digest(b"shared") == digest(b"shared")
    assert len({digest(None), digest(None), digest(b"shared")}) == 3
    for key in (b"", bytes(65)):
        with pytest.raises(ConfigError, match="hash_key"):
            digest(key)
