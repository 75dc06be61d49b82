"""What the runs say: medians, bounds, ratios; as records, as tables for a page."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from cpu_peers.machine import QUIET
from cpu_peers.workloads import WORKLOADS, Shape, Workload, bound, speed, workload

TYPES = ("fp32", "bf16", "int8", "int4")
BITS = {"fp32": "float32", "bf16": "bfloat16", "int8": "8 bits", "int4": "4 bits"}
UNITS = {"a": "new tok/s, one stream", "b": "new tok/s", "c": "new tok/s", "d": "prompt tok/s"}
ENGINES = ("kvpage", "llama.cpp", "openvino", "vllm", "transformers")
Record = dict[str, Any]


def cells(document: Mapping[str, Any]) -> list[Record]:
    """One record for each model, type, workload and engine.

    Speeds in tokens a second; ``bound`` and ``of_bound`` are medians of what was measured around each run;
    ``kvpage_ratio`` is the median of kvpage's speed over this engine's in the same round.
    """
    shapes = {name: Shape(**fields) for name, fields in document["models"].items()}
    works = {
        (model, name): workload(name, shape.vocabulary, document["part"])
        for model, shape in shapes.items()
        for name in WORKLOADS
    }
    groups: dict[tuple[str, str, str, str], list[Record]] = {}
    for run in document["runs"]:
        groups.setdefault((run["model"], run["dtype"], run["workload"], run["engine"]), []).append(run)
    found = []
    for model, shape in shapes.items():
        for dtype in TYPES:
            for name in WORKLOADS:
                base = _speeds(works[model, name], groups.get((model, dtype, name, "kvpage"), []))
                for engine in ENGINES:
                    runs = groups.get((model, dtype, name, engine), [])
                    if runs:
                        which = {"model": model, "dtype": dtype, "workload": name, "engine": engine}
                        found.append({**which, **_cell(shape, works[model, name], dtype, runs, base)})
    return found


def _speeds(work: Workload, runs: Iterable[Record]) -> dict[int, float]:
    return {run["round"]: speed(work, run["seconds"], run["first_token_seconds"]) for run in runs}


def _cell(shape: Shape, work: Workload, dtype: str, runs: list[Record], base: dict[int, float]) -> Record:
    speeds = _speeds(work, runs)
    bounds = {run["round"]: bound(shape, work, dtype, run["bandwidth"], run["arithmetic"]) for run in runs}
    firsts = [run["first_token_seconds"] for run in runs if run["first_token_seconds"] is not None]
    ratios = [base[number] / value for number, value in speeds.items() if number in base]
    return {
        "median": statistics.median(speeds.values()),
        "least": min(speeds.values()),
        "most": max(speeds.values()),
        "rounds": len(runs),
        "bound": statistics.median(bounds.values()),
        "of_bound": statistics.median(speeds[number] / bounds[number] for number in speeds),
        "first_token_seconds": statistics.median(firsts) if firsts else None,
        "kvpage_ratio": statistics.median(ratios) if ratios else None,
        "foreign": max(run["foreign"] for run in runs),
    }


def speed_table(found: Sequence[Record]) -> str:
    """A row for each model, type and workload: kvpage beside its bound and its peers."""
    engines = [name for name in ENGINES if any(cell["engine"] == name for cell in found)]
    peers = [name for name in engines if name != "kvpage"]
    lines = [
        "| | kvpage | bound | of bound | " + "".join(f"{name} | " for name in peers) + "to the best peer |",
        "|---|---|---|---|" + "---|" * len(peers) + "---|",
    ]
    rows: dict[tuple[str, str, str], dict[str, Record]] = {}
    for cell in found:
        rows.setdefault((cell["model"], cell["dtype"], cell["workload"]), {})[cell["engine"]] = cell
    for (model, dtype, name), row in rows.items():
        own = row.get("kvpage")
        best = max(
            (row[peer] for peer in peers if peer in row), key=lambda cell: cell["median"], default=None
        )
        texts = [f"{model} {BITS[dtype]}, {name}", _range(own), _number(next(iter(row.values()))["bound"])]
        texts += ["" if own is None else f"{own['of_bound']:.0%}", *(_range(row.get(peer)) for peer in peers)]
        ratio = None if best is None else best["kvpage_ratio"]
        texts.append("" if best is None or ratio is None else f"**{ratio:.2f}** ({best['engine']})")
        lines.append("| " + " | ".join(texts) + " |")
    if any(cell["foreign"] >= QUIET for cell in found):
        lines += ["", f"`*`: during one of the runs others used more than {QUIET:.0%} of the machine."]
    return "\n".join(lines)


def engine_table(document: Mapping[str, Any], found: Sequence[Record]) -> str:
    """A row for each model, type and engine: first token, memory, start-up."""
    first = {
        (cell["model"], cell["dtype"], cell["engine"]): cell["first_token_seconds"]
        for cell in found
        if cell["workload"] == "a"
    }
    lines = [
        "| | engine | first token, ms | peak memory, MiB | ready, s | of that after `import torch` | "
        "first short run, s |",
        "|---|---|---|---|---|---|---|",
    ]
    rank = {name: place for place, name in enumerate((*document["models"], *TYPES, *ENGINES))}
    keys = ("model", "dtype", "engine")
    for each in sorted(document["engines"], key=lambda record: [rank[record[key]] for key in keys]):
        moment = first.get((each["model"], each["dtype"], each["engine"]))
        imported = _start(each, "import_seconds") > 0.01  # llama.cpp and its like import none
        texts = [
            f"{each['model']} {BITS[each['dtype']]}",
            f"{each['engine']} {each['version'].split()[-1]}",
            "" if moment is None else f"{moment * 1000:.0f}",
            f"{each['peak_bytes'] / 2**20:,.0f}",
            f"{_start(each, 'process_seconds'):.2f}",
            f"{_start(each, 'load_seconds'):.2f}" if imported else "",
            f"{_start(each, 'first_run_seconds'):.2f}",
        ]
        lines.append("| " + " | ".join(texts) + " |")
    return "\n".join(lines)


def _start(record: Record, name: str) -> float:
    return float(statistics.median(start[name] for start in record["starts"]))


def _range(cell: Record | None) -> str:
    if cell is None:
        return ""
    mark = "*" if cell["foreign"] >= QUIET else ""
    return f"{_number(cell['median'])} [{_number(cell['least'])}-{_number(cell['most'])}]{mark}"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"
