"""Where no known mistake explains an output, what the wrong places have in common is said."""

from __future__ import annotations

import pytest
import torch

from kvpage.testing.attention_patterns import Wrong, pattern

ROWS = ((0, 6), (3, 1), (7, 1), (9, 1), (2, 9), (15, 1))
"""(position of the first query, queries), in blocks of four."""


def rows(is_wrong: str) -> list[Wrong]:
    found = []
    for start, queries in ROWS:
        wrong = torch.zeros(queries, 2, 8, dtype=torch.bool)
        for query in range(queries):
            if eval(is_wrong, {"at": start + query, "queries": queries, "start": start}):
                wrong[query] = True
        found.append(Wrong(start, queries, wrong))
    return found


@pytest.mark.parametrize(
    ("is_wrong", "said"),
    [
        ("at >= 4", "block edge: tokens that see keys of one block are right"),
        ("at % 4 == 0 and at > 0", "block edge: only tokens in the first slot"),
        ("at % 4 == 3", "block edge: only tokens in the last slot"),
        ("queries == 1", "rows: those with one query"),
        ("queries > 1", "rows: those with several queries"),
        ("start > 0", "rows: those that find keys in the cache"),
    ],
)
def test_what_wrong_tokens_share_is_named(is_wrong: str, said: str) -> None:
    assert pattern(rows(is_wrong), 4).startswith(said)


def test_wrong_heads_and_elements_are_named() -> None:
    everywhere = rows("True")
    for row in everywhere:
        row.wrong[:, 0] = False
    assert pattern(everywhere, 4) == "heads: only head 1 is wrong (of 2)"
    everywhere = rows("True")
    for row in everywhere:
        row.wrong[..., :6] = False
    assert pattern(everywhere, 4) == "head dim: only elements 6 to 7 are wrong (of 8)"


def test_nothing_is_said_where_nothing_is_shared() -> None:
    assert pattern(rows("True"), 4) == ""
    assert pattern(rows("at % 3 == 0"), 4) == ""
