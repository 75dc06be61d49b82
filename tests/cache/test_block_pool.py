"""A pool reuses what caches nothing first, then what was freed longest ago, and never what is held."""

from __future__ import annotations

import pytest

from kvpage.cache.pool import BlockPool


def test_a_free_cached_block_is_hit_until_it_is_taken_for_something_else() -> None:
    pool = BlockPool(3)
    first = pool.take()
    pool.publish(first, b"a")
    pool.release(first)
    assert pool.index[b"a"] == first
    assert pool.num_free == 2
    taken = {pool.take(), pool.take()}
    assert first in taken
    assert b"a" not in pool.index


def test_blocks_that_cache_nothing_are_reused_before_cached_ones() -> None:
    pool = BlockPool(4)
    cached, plain, _ = pool.take(), pool.take(), pool.take()
    pool.publish(cached, b"a")
    pool.release(cached)
    pool.release(plain)
    assert [pool.take(), pool.take()] == [plain, cached]


def test_of_cached_blocks_the_one_freed_longest_ago_is_evicted_first() -> None:
    pool = BlockPool(4)
    blocks = [pool.take() for _ in range(3)]
    for block in blocks:
        pool.publish(block, bytes([block]))
    for block in (blocks[1], blocks[2], blocks[0]):
        pool.release(block)
    pool.share(blocks[1])  # used again: now the most recent
    pool.release(blocks[1])
    assert [pool.take() for _ in range(3)] == [blocks[2], blocks[0], blocks[1]]


def test_a_shared_block_stays_until_its_last_holder_lets_go() -> None:
    pool = BlockPool(3)
    block = pool.take()
    pool.share(block)
    pool.release(block)
    assert (pool.num_used, block in pool.free) == (1, False)
    pool.release(block)
    assert (pool.num_used, block in pool.free) == (0, True)


def test_the_first_block_with_some_content_stays_the_one_that_is_hit() -> None:
    pool = BlockPool(4)
    first, second = pool.take(), pool.take()
    assert pool.publish(first, b"a")
    assert not pool.publish(second, b"a")
    assert pool.index == {b"a": first}
    pool.check({first: 1, second: 1})


def test_a_withdrawn_block_is_not_hit_and_is_reused_first() -> None:
    pool = BlockPool(4)
    blocks = [pool.take() for _ in range(3)]
    for block in blocks:
        pool.publish(block, bytes([block]))
        pool.release(block)
    pool.withdraw(blocks[2])
    assert bytes([blocks[2]]) not in pool.index
    assert pool.take() == blocks[2]


@pytest.mark.parametrize("damage", ["reference", "index", "digest", "free"])
def test_check_notices(damage: str) -> None:
    pool = BlockPool(4)
    held, cached = pool.take(), pool.take()
    pool.publish(cached, b"a")
    pool.release(cached)
    pool.check({held: 1})
    if damage == "reference":
        pool.references[held] = 2
    elif damage == "index":
        pool.index[b"b"] = held
    elif damage == "digest":
        pool.digests[cached] = b"b"
    else:
        pool.free.append(held)
    with pytest.raises(AssertionError):
        pool.check({held: 1})
