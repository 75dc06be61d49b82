"""Write the tables and charts of docs/performance.md that show what ``cpu.py`` measured.

    python benchmarks/cpu_report.py            # from the newest results of benchmarks/results
    python benchmarks/cpu_report.py --check    # exit 1 where a table or a chart is not what the results say

Results are ``*-cpu.json`` and ``*-cpu-scaling.json``; the newest by name counts. A page without results keeps a line that
says so. Needs the standard library only.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from cpu_peers.chart import bars, scaling_lines
from cpu_peers.report import BITS, cells, engine_table, speed_table

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "performance.md"
IMAGES = ROOT / "docs" / "img"
BEGIN, END = "<!-- made by benchmarks/cpu_report.py: begin -->", "<!-- benchmarks/cpu_report.py: end -->"
NOTHING = "Not measured yet."


def newest(pattern: str) -> tuple[str, dict[str, Any]] | None:
    """Name and contents of the last results of a kind."""
    paths = sorted(RESULTS.glob(pattern))
    return (paths[-1].name, json.loads(paths[-1].read_text(encoding="utf-8"))) if paths else None


def machine(document: dict[str, Any]) -> str:
    """The machine in a few words."""
    found = document["machine"]
    return f"{found['cores']} cores of {found['processor']}"


def speeds(name: str, document: dict[str, Any]) -> tuple[str, dict[Path, str]]:
    """The section of kvpage beside other engines, and its charts."""
    found = cells(document)
    charts = {
        IMAGES / f"cpu-{model}.svg": bars(found, model, machine(document)) for model in document["models"]
    }
    reader = document["probe"]
    runs = document["runs"]
    bandwidths = [run["bandwidth"] / 1e9 for run in runs]
    rates = {
        kind: [run["arithmetic"] / 1e9 for run in runs if run["dtype"] in kinds]
        for kind, kinds in (("float32", ("fp32",)), ("bfloat16", ("bf16",)), ("int8", ("int8", "int4")))
    }
    products = ", ".join(
        f"{min(seen):,.0f}-{max(seen):,.0f} in {kind}" for kind, seen in rates.items() if seen
    )
    lines = [
        f"On {machine(document)}, {document['date']}, `benchmarks/results/{name}`: median [least-most] of "
        f"{max(cell['rounds'] for cell in found)} alternating rounds, tokens a second. Between the runs the machine read "
        f"{min(bandwidths):.0f}-{max(bandwidths):.0f} GB/s (`{reader['reader']}`), and torch {reader['torch']} made "
        f"products of (10^9 operations a second) {products}.",
        "",
        speed_table(found),
        "",
        *(f"![Speeds of model {path.stem.removeprefix('cpu-')}](img/{path.name})" for path in charts),
        "",
        engine_table(document, found),
    ]
    return "\n".join(lines), charts


def scaled(name: str, document: dict[str, Any]) -> tuple[str, dict[Path, str]]:
    """The section of how decode scales, and its charts."""
    kinds = list(dict.fromkeys((point["model"], point["dtype"]) for point in document["scaling"]))
    charts = {
        IMAGES / f"cpu-scaling-{model}-{dtype}.svg": scaling_lines(document, model, dtype, machine(document))
        for model, dtype in kinds
    }
    pictures = [
        f"![Decode of model {model} in {BITS[dtype]} over batch and context](img/{path.name})"
        for path, (model, dtype) in zip(charts, kinds, strict=True)
    ]
    return "\n".join([f"`benchmarks/results/{name}`:", "", *pictures]), charts


def pages() -> dict[Path, str]:
    """Every file that follows from the results, with its text."""
    texts: list[str] = []
    files: dict[Path, str] = {}
    for pattern, make in (("*-cpu.json", speeds), ("*-cpu-scaling.json", scaled)):
        found = newest(pattern)
        if found is not None:
            text, charts = make(*found)
            texts.append(text)
            files |= charts
    page = PAGE.read_text(encoding="utf-8")
    before, mark, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (mark and end):
        raise SystemExit(f"{PAGE.name} lacks the lines {BEGIN} and {END}")
    section = "\n\n".join(texts) or NOTHING
    return {**files, PAGE: f"{before}{BEGIN}\n\n{section}\n\n{END}{after}"}


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where a file is stale")
    check = parser.parse_args().check
    files = pages()
    stale = [
        path for path, text in files.items() if not path.is_file() or path.read_text(encoding="utf-8") != text
    ]
    for path in stale:
        if check:
            print(f"{path.relative_to(ROOT)} is stale: run python benchmarks/cpu_report.py", file=sys.stderr)
        else:
            path.parent.mkdir(exist_ok=True)
            path.write_text(files[path], encoding="utf-8")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
