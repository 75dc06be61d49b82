"""Charts of the results as plain SVG: bars of every engine with the bound of each cell, lines of how decode scales."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from cpu_peers.report import BITS, ENGINES, TYPES, UNITS, Record
from cpu_peers.workloads import WORKLOADS, Shape, decode_bound

COLOURS = {
    "kvpage": "#1565c0",
    "llama.cpp": "#8d6e63",
    "openvino": "#7e57c2",
    "vllm": "#ef8f2f",
    "transformers": "#78909c",
}
LINES = ("#1565c0", "#ef8f2f", "#2e7d32", "#8e24aa")
BOUND, INK, GRID = "#c62828", "#263238", "#cfd8dc"
PANEL, LABEL, BAR, STEP = 300, 84, 13, 18
PLOT_WIDTH, PLOT_HEIGHT, MARGIN = 300, 190, 56


def bars(found: Sequence[Record], model: str, machine: str) -> str:
    """A panel for each workload and type: a bar an engine, whiskers from least to most, the bound as a dashed line."""
    own = [cell for cell in found if cell["model"] == model]
    types = [dtype for dtype in TYPES if any(cell["dtype"] == dtype for cell in own)]
    engines = [name for name in ENGINES if any(cell["engine"] == name for cell in own)]
    names = [name for name in WORKLOADS if any(cell["workload"] == name for cell in own)]
    height = 40 + STEP * len(engines)
    parts = []
    for row, name in enumerate(names):
        for column, dtype in enumerate(types):
            panel = {c["engine"]: c for c in own if (c["workload"], c["dtype"]) == (name, dtype)}
            if panel:
                place = f"translate({16 + column * (PANEL + LABEL)} {64 + row * height})"
                title = f"{name}: {UNITS[name]}, {BITS[dtype]}"
                parts.append(f'<g transform="{place}">{_panel(panel, engines, title)}</g>')
    width = 32 + len(types) * (PANEL + LABEL)
    heading = f"Model {model}, {machine}"
    legend = "bar: median; line: least to most; dashed: what the machine allows"
    return _page(width, 72 + height * len(names), heading, legend, parts)


def _panel(panel: Mapping[str, Record], engines: Sequence[str], title: str) -> str:
    limit = next(iter(panel.values()))["bound"]
    widest = max(limit, *(cell["most"] for cell in panel.values()))
    scale = (PANEL - 76) / widest  # leaves room for the figures
    parts = [f'<text y="12" font-weight="600">{escape(title)}</text>']
    for place, engine in enumerate(engines):
        top = 22 + place * STEP
        parts.append(f'<text x="{LABEL - 8}" y="{top + 11}" text-anchor="end">{engine}</text>')
        if engine not in panel:
            continue
        cell = panel[engine]
        middle, end = top + BAR / 2, LABEL + scale * cell["median"]
        least, most = LABEL + scale * cell["least"], LABEL + scale * cell["most"]
        parts += [
            f'<rect x="{LABEL}" y="{top}" width="{end - LABEL:.1f}" height="{BAR}" fill="{COLOURS[engine]}"/>',
            f'<path d="M{least:.1f} {middle}H{most:.1f}" stroke="{INK}"/>',
            f'<text x="{PANEL + LABEL - 22}" y="{top + 11}" text-anchor="end">{figure(cell["median"])}</text>',
        ]
    at, bottom = LABEL + scale * limit, 22 + STEP * len(engines)
    parts.append(
        f'<path d="M{at:.1f} 18V{bottom}" stroke="{BOUND}" stroke-width="1.5" stroke-dasharray="4 3"/>'
    )
    parts.append(f'<text x="{at:.1f}" y="14" fill="{BOUND}" text-anchor="middle">{figure(limit)}</text>')
    return "".join(parts)


def scaling_lines(document: Mapping[str, Any], model: str, dtype: str, machine: str) -> str:
    """Decode speed over the batch (by threads) and over the context (by threads and batch), each with its bound."""
    points = [p for p in document["scaling"] if (p["model"], p["dtype"]) == (model, dtype)]
    shape = Shape(**document["models"][model])
    threads = {
        count: "1 thread" if count == 1 else f"{count} threads"
        for count in sorted({p["threads"] for p in points})
    }
    least = min(point["context"] for point in points)

    def line(label: str, over: str, chosen: Sequence[Record]) -> tuple[str, list[tuple[float, float, float]]]:
        ordered = sorted(chosen, key=lambda point: point[over])
        return label, [(p[over], p["batch"] / p["step_seconds"], _limit(shape, p)) for p in ordered]

    by_batch = [
        line(label, "batch", [p for p in points if (p["threads"], p["context"]) == (count, least)])
        for count, label in threads.items()
    ]
    batches = sorted({point["batch"] for point in points if point["context"] > least})
    by_context = [
        line(f"{label}, batch {batch}", "context",
             [p for p in points if (p["threads"], p["batch"]) == (count, batch)])
        for count, label in threads.items() for batch in batches
    ]  # fmt: skip
    plots = [(f"batch, at a context of {least} tokens", by_batch), ("context, tokens", by_context)]
    parts = [
        f'<g transform="translate({MARGIN + place * (PLOT_WIDTH + MARGIN + 24)} 70)">{_plot(title, lines)}</g>'
        for place, (title, lines) in enumerate(plots)
        if any(found for _, found in lines)
    ]
    heading = f"kvpage, decode, model {model} {BITS[dtype]}, {machine}"
    legend = "new tokens a second, both scales logarithmic; dashed: what the machine allows"
    return _page(2 * (PLOT_WIDTH + MARGIN) + 48, PLOT_HEIGHT + 190, heading, legend, parts)


def _limit(shape: Shape, point: Record) -> float:
    sizes = (point["batch"], point["context"], point["bandwidth"], point["arithmetic"])
    return decode_bound(shape, point["dtype"], *sizes)


def _plot(title: str, lines: Sequence[tuple[str, list[tuple[float, float, float]]]]) -> str:
    every = [point for _, points in lines for point in points]
    left, right = (edge(math.log2(x) for x, _, _ in every) for edge in (min, max))
    values = [value for _, y, limit in every for value in (y, limit)]
    ticks = [digit * 10**power for power in range(-3, 9) for digit in (1, 2, 5)]
    least = max(tick for tick in ticks if tick <= min(values))
    most = min(tick for tick in ticks if tick >= max(values))
    height = PLOT_HEIGHT / math.log10(most / least)

    def place(x: float, y: float) -> str:
        across = (math.log2(x) - left) / max(right - left, 1) * PLOT_WIDTH
        return f"{across:.1f} {height * math.log10(most / y):.1f}"

    parts = []
    for tick in (tick for tick in ticks if least <= tick <= most):
        level = height * math.log10(most / tick)
        parts.append(f'<path d="M0 {level:.1f}H{PLOT_WIDTH}" stroke="{GRID}"/>')
        parts.append(f'<text x="-6" y="{level + 4:.1f}" text-anchor="end">{tick:,g}</text>')
    for x in sorted({point[0] for point in every}):
        across = place(x, least).split()[0]
        parts.append(f'<text x="{across}" y="{PLOT_HEIGHT + 16}" text-anchor="middle">{x:g}</text>')
    for number, (label, points) in enumerate(lines):
        colour = LINES[number % len(LINES)]
        measured = "L".join(place(x, y) for x, y, _ in points)
        allowed = "L".join(place(x, limit) for x, _, limit in points)
        dots = "".join('<circle r="2.5" cx="{}" cy="{}"/>'.format(*place(x, y).split()) for x, y, _ in points)
        level = PLOT_HEIGHT + 54 + 16 * number
        parts += [
            f'<path d="M{measured}" fill="none" stroke="{colour}" stroke-width="2"/>',
            f'<path d="M{allowed}" fill="none" stroke="{colour}" stroke-dasharray="4 3"/>',
            f'<g fill="{colour}">{dots}</g>',
            f'<path d="M0 {level - 4}h18" stroke="{colour}" stroke-width="2"/>',
            f'<text x="24" y="{level}">{escape(label)}</text>',
        ]
    parts.append(
        f'<text x="{PLOT_WIDTH / 2}" y="{PLOT_HEIGHT + 34}" text-anchor="middle">{escape(title)}</text>'
    )
    return "".join(parts)


def _page(width: float, height: float, heading: str, legend: str, parts: Sequence[str]) -> str:
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" '
            f'font-family="system-ui, sans-serif" font-size="12" role="img" aria-label="{escape(heading)}">',
            f'<rect width="{width:g}" height="{height:g}" rx="8" fill="#fafbfc"/>',
            f'<g fill="{INK}">',
            f'<text x="16" y="26" font-size="14" font-weight="600">{escape(heading)}</text>',
            f'<text x="16" y="44">{escape(legend)}</text>',
            *parts,
            "</g>",
            "</svg>",
            "",
        ]
    )


def figure(value: float) -> str:
    """A speed with as many digits as it is good for."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"
