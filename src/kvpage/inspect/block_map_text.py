"""A block map in plain ASCII."""

from __future__ import annotations

import string
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvpage.inspect.snapshot import BlockMap, BlockView, GroupView

LETTERS = string.ascii_lowercase + string.ascii_uppercase
"""One a sequence, from the beginning again where there are more sequences."""
FREE, CACHED, SHARED = ".", "+", "#"
TABLE_LIMIT = 12
"""Most block numbers a sequence's line shows."""


def block_map_text(block_map: BlockMap, width: int) -> str:
    """See ``BlockMap.to_text``."""
    letters = {
        (sequence.request_id, sequence.choice): LETTERS[number % len(LETTERS)]
        for number, sequence in enumerate(block_map.sequences)
    }
    lines: list[str] = []
    for group in block_map.groups:
        lines += [*_group(block_map, group, letters, max(8, width)), ""]
    lines.append(
        f"legend: a letter = a block of one sequence, {SHARED} = shared by several, {CACHED} = kept for a "
        f"prefix hit, {FREE} = free"
    )
    lines += _sequences(block_map, letters)
    return "\n".join(lines)


def summary(block_map: BlockMap, group: GroupView) -> str:
    """Counts of one group: blocks by state, and how full the held ones are."""
    held = [block for block in group.blocks if block.references]
    tokens = sum(block.filled for block in held)
    cached = sum(block.cached for block in group.blocks)
    window = f", window {group.window}" if group.window is not None else ""
    text = (
        f"KV group {group.index} ({group.kind}{window}): {len(group.blocks):,} blocks of {block_map.block_size} "
        f"tokens: {len(held):,} in use ({group.count('shared'):,} shared), {group.count('cached'):,} kept for a "
        f"prefix hit ({cached:,} with those in use), {group.count('free'):,} free"
    )
    return text + (f"; {tokens:,} of {len(held) * block_map.block_size:,} token slots filled" if held else "")


def rows_with_content(group: GroupView, columns: int) -> Iterator[tuple[Sequence[BlockView], int]]:
    """Rows of ``columns`` blocks; a run of wholly free rows comes as one entry ((), number of blocks)."""
    free = 0
    for start in range(0, len(group.blocks), columns):
        row = group.blocks[start : start + columns]
        if all(block.state == "free" for block in row):
            free += len(row)
            continue
        if free:
            yield (), free
            free = 0
        yield row, 0
    if free:
        yield (), free


def _group(
    block_map: BlockMap, group: GroupView, letters: dict[tuple[str, int], str], width: int
) -> Iterator[str]:
    yield summary(block_map, group)
    margin = len(str(len(group.blocks)))
    for row, free in rows_with_content(group, width):
        if free:
            yield f"{'':>{margin}}  ({free:,} free)"
        else:
            yield f"{row[0].number:>{margin}}  {''.join(_glyph(block, letters) for block in row)}"


def _glyph(block: BlockView, letters: dict[tuple[str, int], str]) -> str:
    if block.state == "used" and block.owners:
        return letters[block.owners[0].request_id, block.owners[0].choice]
    return {"free": FREE, "cached": CACHED}.get(block.state, SHARED)


def _sequences(block_map: BlockMap, letters: dict[tuple[str, int], str]) -> Iterator[str]:
    if not block_map.sequences:
        yield "no sequences"
        return
    names = [f"{sequence.request_id}/{sequence.choice}" for sequence in block_map.sequences]
    width = max(len(name) for name in names)
    for name, sequence in zip(names, block_map.sequences, strict=True):
        place = f"slot {sequence.slot}" if sequence.slot >= 0 else ""
        table = sequence.tables[0] if sequence.tables else ()
        shown = " ".join(str(block) for block in table[:TABLE_LIMIT])
        of_group = "" if len(sequence.tables) < 2 else " (group 0)"
        more = f" ... ({len(table)} in all)" if len(table) > TABLE_LIMIT else ""
        letter = letters[sequence.request_id, sequence.choice]
        yield (
            f"  {letter}  {name:<{width}}  {sequence.state} {place:<8} {sequence.computed:>6} of "
            f"{sequence.known} tokens computed  blocks{of_group} {shown}{more}".rstrip()
        )
