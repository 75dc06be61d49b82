"""A block map as SVG: self-contained, no script, legible on light and dark pages."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from typing import TYPE_CHECKING

from kvpage.inspect.block_map_text import rows_with_content, summary

if TYPE_CHECKING:
    from kvpage.inspect.snapshot import BlockMap, BlockView, SequenceView

CELL, GAP, MARGIN, LINE = 14, 2, 16, 18
LETTER = 7.3
"""Pixels that a letter needs, at most."""
LEGEND_WIDTH = 880
GOLDEN_ANGLE = 137.508
"""Degrees of hue between neighbours: any number of colours stays apart."""
STYLE = """\
.page{fill:#ffffff}.text{fill:#1f2328;font:12px ui-monospace,Menlo,Consolas,monospace}
.quiet{fill:#59636e}.free{fill:none;stroke:#c3cad1}.cached{fill:#c3cad1;stroke:#8c959f}
.frame{fill:none;stroke:#8c959f}.shared{fill:none;stroke:#1f2328;stroke-width:2}
@media (prefers-color-scheme:dark){.page{fill:#0d1117}.text{fill:#e6edf3}.quiet{fill:#9198a1}
.free{stroke:#3d444d}.cached{fill:#3d444d;stroke:#656c76}.frame{stroke:#656c76}.shared{stroke:#e6edf3}}"""


def block_map_svg(block_map: BlockMap, columns: int) -> str:
    """See ``BlockMap.to_svg``."""
    hues = {
        (sequence.request_id, sequence.choice): round(number * GOLDEN_ANGLE) % 360
        for number, sequence in enumerate(block_map.sequences)
    }
    body: list[str] = []
    top = MARGIN + LINE
    for group in block_map.groups:
        body.append(_text(MARGIN, top, summary(block_map, group)))
        top += LINE // 2
        for row, free in rows_with_content(group, columns):
            if free:
                body.append(_text(MARGIN, top + CELL, f"{free:,} free blocks", "text quiet"))
                top += LINE
                continue
            for column, block in enumerate(row):
                body += _cell(MARGIN + column * (CELL + GAP), top, block, block_map.block_size, hues)
            top += CELL + GAP
        top += 2 * LINE
    body += _legend(top)
    top += 2 * LINE
    for sequence in block_map.sequences:
        body += _sequence_line(top, sequence, hues[sequence.request_id, sequence.choice])
        top += LINE
    letters = max((len(summary(block_map, group)) for group in block_map.groups), default=0)
    width = max(LEGEND_WIDTH, 2 * MARGIN + columns * (CELL + GAP), 2 * MARGIN + round(LETTER * letters))
    return "\n".join((
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {top}" width="{width}" height="{top}" '
        'role="img" aria-label="KV block map">',
        f"<style>{STYLE}</style>",
        f'<rect class="page" width="{width}" height="{top}"/>',
        *body,
        "</svg>",
        "",
    ))  # fmt: skip


def _cell(
    x: int, y: int, block: BlockView, block_size: int, hues: dict[tuple[str, int], int]
) -> Iterator[str]:
    holders = ", ".join(f"{owner.request_id}/{owner.choice} [{owner.index}]" for owner in block.owners)
    title = f"block {block.number}: {block.state}, {block.filled}/{block_size} tokens"
    title += ", in the prefix index" if block.cached else ""
    yield f"<g><title>{escape(title + (', ' + holders if holders else ''))}</title>"
    if block.state in ("free", "cached"):
        yield _square(x, y, block.state)
    else:
        hue = hues.get((block.owners[0].request_id, block.owners[0].choice), 0) if block.owners else 0
        height = max(1, round(CELL * block.filled / block_size)) if block.filled else 0
        yield (
            f'<rect x="{x}" y="{y + CELL - height}" width="{CELL}" height="{height}" fill="hsl({hue} 60% 52%)"/>'
        )
        yield _square(x, y, "frame" if block.state == "used" else "shared")
    yield "</g>"


def _legend(top: int) -> Iterator[str]:
    x = MARGIN
    for name, text in (
        ("frame", "used: as high as it is filled, one colour a sequence"),
        ("shared", "shared"),
        ("cached", "cached prefix"),
        ("free", "free"),
    ):
        y = top - CELL + 3
        if name in ("frame", "shared"):
            half = CELL // 2
            yield f'<rect x="{x}" y="{y + half}" width="{CELL}" height="{half}" fill="hsl(210 60% 52%)"/>'
        yield _square(x, y, name)
        yield _text(x + CELL + 6, top, text)
        x += CELL + 6 + 8 * len(text) + 16


def _sequence_line(top: int, sequence: SequenceView, hue: int) -> Iterator[str]:
    blocks = sum(1 for block in sequence.tables[0] if block) if sequence.tables else 0
    place = f"slot {sequence.slot}" if sequence.slot >= 0 else "no slot"
    yield f'<rect x="{MARGIN}" y="{top - 10}" width="{CELL}" height="12" fill="hsl({hue} 60% 52%)"/>'
    yield _text(MARGIN + CELL + 6, top, f"{sequence.request_id}/{sequence.choice}  {sequence.state}, {place}, "
                f"{sequence.computed} of {sequence.known} tokens computed, {blocks} blocks")  # fmt: skip


def _square(x: int, y: int, name: str) -> str:
    return f'<rect class="{name}" x="{x + 0.5}" y="{y + 0.5}" width="{CELL - 1}" height="{CELL - 1}"/>'


def _text(x: int, y: int, text: str, name: str = "text") -> str:
    return f'<text class="{name}" x="{x}" y="{y}">{escape(text)}</text>'
