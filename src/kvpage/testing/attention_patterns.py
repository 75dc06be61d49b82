"""What the wrong places have in common, where no known mistake explains them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Wrong:
    """One row of a step: the position of its first query, its queries, and what is wrong, bool [Q, Hq, Dv]."""

    start: int
    queries: int
    wrong: torch.Tensor


def pattern(rows: Sequence[Wrong], block_size: int) -> str:
    """The first statement that tells all wrong tokens from all right ones, or ``""``."""
    tokens = [
        (row, row.start + query, bool(row.wrong[query].any())) for row in rows for query in range(row.queries)
    ]
    statements: dict[str, Callable[[Wrong, int], bool]] = {
        f"block edge: tokens that see keys of one block are right, those from position {block_size} on, which see "
        "the next block, are wrong": lambda row, at: at >= block_size,
        "block edge: only tokens in the first slot of a later block are wrong": lambda row, at: (
            at >= block_size and at % block_size == 0
        ),
        "block edge: only tokens in the last slot of a block are wrong": lambda row, at: (
            at % block_size == block_size - 1
        ),
        "rows: those with one query (decode) are wrong, those with several are right": lambda row, at: (
            row.queries == 1
        ),
        "rows: those with several queries (chunks) are wrong, those with one are right": lambda row, at: (
            row.queries > 1
        ),
        "rows: those that find keys in the cache are wrong, those that begin are right": lambda row, at: (
            row.start > 0
        ),
    }
    for text, holds in statements.items():
        verdicts = [(holds(row, at), wrong) for row, at, wrong in tokens]
        if all(said == wrong for said, wrong in verdicts) and len({wrong for _, wrong in verdicts}) == 2:
            return text
    return next(_of_heads_and_elements(rows), "")


def _of_heads_and_elements(rows: Sequence[Wrong]) -> Iterator[str]:
    heads = torch.stack([row.wrong.any(0).any(-1) for row in rows]).any(0)
    elements = torch.stack([row.wrong.any(0).any(0) for row in rows]).any(0)
    if not bool(heads.all()):
        numbers = heads.nonzero().flatten().tolist()
        told = f"head {numbers[0]} is" if len(numbers) == 1 else f"heads {', '.join(map(str, numbers))} are"
        yield f"heads: only {told} wrong (of {len(heads)})"
    if not bool(elements.all()):
        first, last = int(elements.nonzero()[0]), int(elements.nonzero()[-1])
        told = f"element {first} is" if first == last else f"elements {first} to {last} are"
        yield f"head dim: only {told} wrong (of {len(elements)})"
