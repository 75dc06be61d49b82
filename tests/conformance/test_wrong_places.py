"""Where no known mistake explains an output, what the wrong places have in common is said."""

from __future__ import annotations

import pytest
import torch

from kvpage.testing.attention_patterns import Wrong, pattern
from kvpage.testing.comparing import require_equal, told_apart
from kvpage.testing.suite import ConformanceError

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


def test_values_whose_decimals_agree_are_told_apart_by_their_bits() -> None:
    one = torch.tensor(0x3FB999999999999A).view(torch.float64)
    other = torch.tensor(0x3FB999999999999B).view(torch.float64)
    texts = ("0.1 (float64, bits 0x3fb999999999999a)", "0.1 (float64, bits 0x3fb999999999999b)")
    assert told_apart(one, other) == texts
    assert told_apart(torch.tensor(0.0), torch.tensor(-0.0)) == ("0", "-0")
    assert told_apart(torch.tensor(-1), torch.tensor(7)) == ("-1", "7")


def test_two_kinds_of_nan_are_told_apart() -> None:
    one, other = torch.tensor([0x7FC00000, -1], dtype=torch.int32).view(torch.float32)
    assert told_apart(one, other) == ("nan (float32, bits 0x7fc00000)", "nan (float32, bits 0xffffffff)")


def test_a_difference_in_the_last_bit_is_told_in_full() -> None:
    values = torch.tensor([0.1, 0.1], dtype=torch.float64)
    values[0] += 2**-56
    with pytest.raises(
        ConformanceError, match=r"got 0\.1 \(float64, bits 0x\w+\), expected 0\.1 \(float64, bits 0x"
    ):
        require_equal("bits", values[:1], values[1:], ("entry",))


def test_one_wrong_element_is_named_by_its_number() -> None:
    everywhere = rows("True")
    for row in everywhere:
        row.wrong[..., [*range(5), 6, 7]] = False
    assert pattern(everywhere, 4) == "head dim: only element 5 is wrong (of 8)"
