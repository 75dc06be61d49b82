"""kvpage and other engines on this CPU: the same workloads, in alternating runs, beside the machine's bounds.

In full (a, b, c, d are described in cpu_peers/workloads.py; hours), and the short way:

    python benchmarks/cpu.py --models MODELS --model S,M --dtypes bf16,int8,int4 --engines kvpage,llama.cpp,openvino,vllm \\
        --python llama.cpp=LLAMACPP/bin/python --python openvino=OPENVINO/bin/python --python vllm=VLLM/bin/python \\
        --rounds 5 --out benchmarks/results/DATE-MACHINE-COMMIT-cpu.json
    python benchmarks/cpu.py --models MODELS --model S --workloads a,b --rounds 3 --python llama.cpp=LLAMACPP/bin/python \\
        --engines kvpage,llama.cpp
    python benchmarks/cpu.py --models MODELS --model S --scaling --out benchmarks/results/DATE-MACHINE-COMMIT-cpu-scaling.json
    python benchmarks/cpu_report.py    # tables and charts of docs/performance.md, of the newest results

MODELS is a folder of S-bf16 (make_model.py) and of what peers need of it (cpu_peers/convert.py). Each engine lives in a
process and an environment of its own (--python NAME=INTERPRETER; this one where none is named), loads once, is stopped
while another one runs, and runs a workload when its turn comes. Before and after each run the read bandwidth and torch's
rate of products are measured, and the bound of that run follows from them: bytes of the weights at the type's width over
bandwidth for a, counted operations over the rate for the rest. A run during which others used more than 6 % of the
machine is repeated. Linux only.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import tempfile
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

from cpu_peers.machine import describe
from cpu_peers.report import ENGINES, TYPES, cells, engine_table, speed_table
from cpu_peers.rounds import Setup, compare, probe, say
from cpu_peers.scaling import CONTEXTS, scaling
from cpu_peers.workloads import WORKLOADS, Shape, workload


def options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument(
        "--model", type=_names, default=["S"], help="S, M or both: the folders <model>-<kind>"
    )
    parser.add_argument("--dtypes", type=_names, default=["bf16"], help=", ".join(TYPES))
    parser.add_argument("--workloads", type=_names, default=list(WORKLOADS))
    parser.add_argument("--engines", type=_names, default=["kvpage"], help=", ".join(ENGINES))
    parser.add_argument("--python", action="append", default=[], metavar="NAME=INTERPRETER", help="or probe=")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2, help="with --scaling 1 thread too")
    parser.add_argument("--attempts", type=int, default=3, help="runs at most where others use the machine")
    parser.add_argument("--wait", type=float, default=40.0, help="seconds to wait for a quiet machine")
    parser.add_argument(
        "--patience", type=float, default=1800.0, help="seconds an engine may take for anything"
    )
    parser.add_argument(
        "--part", type=int, default=1, choices=[1, 2, 4, 8, 16], help="divides every length, to try"
    )
    parser.add_argument("--scaling", action="store_true", help="kvpage alone over batch, context and threads")
    parser.add_argument("--largest-context", type=int, default=max(CONTEXTS), help="of --scaling")
    parser.add_argument("--log", type=Path, help="what the engines print (a temporary file otherwise)")
    parser.add_argument("--out", type=Path, help="a file that has runs already keeps those of other cells")
    found = parser.parse_args()
    for given, known in ((found.dtypes, TYPES), (found.workloads, WORKLOADS), (found.engines, ENGINES)):
        for name in given:
            if name not in known:
                parser.error(f"{name!r} is none of {', '.join(known)}")
    return found


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def measure(given: argparse.Namespace, setup: Setup) -> dict[str, Any]:
    """Run everything that was asked for, and keep it as it comes."""
    document = _begin(given)
    if given.scaling:
        threads = sorted({1, given.threads})
        for model in given.model:
            for dtype in given.dtypes:
                document["scaling"] += scaling(setup, model, dtype, threads, given.largest_context)
                _keep(given, document)
        return document
    with probe(setup) as bounds:
        document["probe"] = bounds.about
        for model in given.model:
            works = [
                workload(name, Shape(**document["models"][model]).vocabulary, given.part)
                for name in given.workloads
            ]
            for dtype in given.dtypes:
                found = compare(setup, bounds, given.engines, model, dtype, works, given.rounds)
                _merge(document, found)
                _keep(given, document)
    return document


def _begin(given: argparse.Namespace) -> dict[str, Any]:
    document: dict[str, Any] = {"runs": [], "engines": [], "scaling": [], "models": {}, "part": given.part}
    if given.out and given.out.exists():
        document |= json.loads(given.out.read_text(encoding="utf-8"))
        if document["part"] != given.part:
            raise SystemExit(f"{given.out} holds runs of --part {document['part']}")
    for model in given.model:
        document["models"][model] = asdict(Shape.read(given.models / f"{model}-bf16"))
    return {**document, "machine": describe(), "commit": _commit(), "date": date.today().isoformat()}


def _merge(document: dict[str, Any], found: dict[str, list[dict[str, Any]]]) -> None:
    """Add records; those of the same cell are replaced."""
    for kind, keys in (
        ("runs", ("model", "dtype", "workload", "engine")),
        ("engines", ("model", "dtype", "engine")),
    ):
        new = {tuple(record[key] for key in keys) for record in found[kind]}
        kept = [record for record in document[kind] if tuple(record[key] for key in keys) not in new]
        document[kind] = kept + found[kind]


def _keep(given: argparse.Namespace, document: dict[str, Any]) -> None:
    if given.out:
        text = json.dumps({**document, "cells": cells(document)}, indent=1)
        given.out.write_text(text + "\n", encoding="utf-8")


def _commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def main() -> None:
    """The command."""
    given = options()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that stopped workers are ended too
    pythons = dict.fromkeys((*ENGINES, "probe"), sys.executable)
    pythons |= dict(pair.split("=", 1) for pair in given.python)
    path = given.log or Path(tempfile.mkstemp(suffix=".log")[1])
    with path.open("wb") as log:
        say(f"what the engines print goes to {log.name}")
        setup = Setup(
            models=given.models.resolve(),
            pythons=pythons,
            threads=given.threads,
            attempts=given.attempts,
            wait=given.wait,
            patience=given.patience,
            log=log,
        )
        document = measure(given, setup)
    if given.scaling:
        return
    found = cells(document)
    print(speed_table(found))
    print()
    print(engine_table(document, found))


if __name__ == "__main__":
    main()
