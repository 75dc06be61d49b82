"""The free list keeps its order, and lets go of any block at once."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvpage.cache.block import FreeList


def test_blocks_come_out_in_the_order_of_their_numbers_at_first() -> None:
    free = FreeList(5)
    assert [free.pop() for _ in range(4)] == [1, 2, 3, 4]
    assert len(free) == 0


def test_appended_comes_last_and_prepended_first() -> None:
    free = FreeList(4)
    for block in (1, 2, 3):
        free.remove(block)
    free.append(2)
    free.append(3)
    free.prepend(1)
    assert list(free) == [1, 2, 3]


def test_the_null_block_is_never_in_the_list() -> None:
    free = FreeList(3)
    assert 0 not in free
    assert 0 not in list(free)


@given(
    st.integers(2, 12),
    st.lists(st.tuples(st.sampled_from(["pop", "remove", "append", "prepend"]), st.integers())),
)
def test_it_does_what_a_plain_list_would_do(num_blocks: int, operations: list[tuple[str, int]]) -> None:
    free, model = FreeList(num_blocks), list(range(1, num_blocks))
    for operation, pick in operations:
        out = [block for block in range(1, num_blocks) if block not in model]
        if operation == "pop" and model:
            assert free.pop() == model.pop(0)
        elif operation == "remove" and model:
            block = model.pop(pick % len(model))
            free.remove(block)
        elif operation == "append" and out:
            model.append(out[pick % len(out)])
            free.append(model[-1])
        elif operation == "prepend" and out:
            model.insert(0, out[pick % len(out)])
            free.prepend(model[0])
        free.check()
        assert list(free) == model
        assert len(free) == len(model)
        assert all((block in free) == (block in model) for block in range(num_blocks))


def test_check_notices_a_block_that_is_linked_one_way_only() -> None:
    free = FreeList(4)
    free._preceding[3] = 1
    with pytest.raises(AssertionError, match="backward"):
        free.check()
