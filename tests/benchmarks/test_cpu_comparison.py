"""benchmarks/cpu.py: its bounds are those that were stated, its report says what the runs say, its workers stand still."""

from __future__ import annotations

import importlib
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = ROOT / "benchmarks"
SMALL = {"hidden": 768, "layers": 12, "heads": 12, "kv_heads": 4, "head_dim": 64, "intermediate": 2048}
Load = Callable[[str], Any]


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch) -> Iterator[Load]:
    """Import a module as it is imported when benchmarks/cpu.py runs."""
    monkeypatch.syspath_prepend(str(PROGRAMS))
    before = set(sys.modules)

    def load(name: str) -> ModuleType:
        return importlib.import_module(name)

    yield load
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(PROGRAMS)):
            del sys.modules[name]


def document(program: Load) -> dict[str, Any]:
    """Two rounds of kvpage and of one peer, on a machine that reads 30 GB/s and makes 435 GFLOP/s."""
    works = program("cpu_peers.workloads")
    runs = [
        {
            "model": "S", "dtype": "bf16", "workload": name, "engine": engine, "round": number,
            "seconds": 2.0 * factor, "first_token_seconds": 1.0 * factor if name == "a" else None,
            "bandwidth": 30e9, "arithmetic": 435e9, "foreign": 0.0, "peak_bytes": 2**29, "attempts": 1,
        }
        for number in (0, 1)
        for engine, factor in (("kvpage", 1.0 + number), ("vllm", 2.0))
        for name in works.WORKLOADS
    ]  # fmt: skip
    starts = [{"import_seconds": 1.0, "load_seconds": 0.5, "first_run_seconds": 0.1, "process_seconds": 1.6}]
    engines = [
        {
            "model": "S",
            "dtype": "bf16",
            "engine": engine,
            "version": "1.0",
            "starts": starts,
            "peak_bytes": 2**29,
        }
        for engine in ("kvpage", "vllm")
    ]
    points = [
        {
            "model": "S", "dtype": "bf16", "threads": threads, "batch": batch, "context": context,
            "step_seconds": 0.01 * batch, "bandwidth": 30e9, "arithmetic": 435e9,
        }
        for threads in (1, 2)
        for batch, context in ((1, 128), (8, 128), (1, 1024), (8, 1024))
    ]  # fmt: skip
    return {
        "models": {"S": asdict(works.Shape(vocabulary=32000, **SMALL))},
        "part": 1,
        "machine": {"cores": 2, "processor": "a <processor>"},
        "date": "2026-01-01",
        "probe": {"reader": "torch.sum", "torch": "2"},
        "runs": runs,
        "engines": engines,
        "scaling": points,
    }


def test_a_workload_is_the_same_at_each_call_and_divides(program: Load) -> None:
    works = program("cpu_peers.workloads")
    for name in works.WORKLOADS:
        assert works.workload(name, 32000) == works.workload(name, 32000)
        assert works.workload(name, 32000, 16).new_tokens <= works.workload(name, 32000).new_tokens
    batch = works.workload("b", 32000)
    assert (sum(len(request.prompt) for request in batch.requests), batch.new_tokens) == (4803, 4474)
    shared = works.workload("c", 32000)
    assert len({tuple(request.prompt[: shared.shared]) for request in shared.requests}) == 1
    assert len({tuple(request.prompt) for request in shared.requests}) == 32


@pytest.mark.parametrize(
    ("name", "dtype", "arithmetic", "expected"),
    [("a", "bf16", 435e9, 150), ("a", "int4", 868e9, 564), ("b", "bf16", 435e9, 1166),
     ("b", "int8", 868e9, 2327), ("c", "bf16", 435e9, 933), ("d", "bf16", 435e9, 2304)],
)  # fmt: skip
def test_bounds_of_the_small_model_at_30_gigabytes_a_second(
    program: Load, name: str, dtype: str, arithmetic: float, expected: int
) -> None:
    works = program("cpu_peers.workloads")
    shape = works.Shape(vocabulary=32000, **SMALL)
    assert round(works.bound(shape, works.workload(name, 32000), dtype, 30e9, arithmetic)) == expected


def test_a_decode_step_is_bound_by_bytes_alone_and_by_operations_in_a_batch(program: Load) -> None:
    works = program("cpu_peers.workloads")
    shape = works.Shape(vocabulary=32000, **SMALL)
    alone = works.decode_bound(shape, "bf16", 1, 1, 30e9, 435e9)
    assert alone == pytest.approx(30e9 / works.bytes_a_token(shape, "bf16"), rel=1e-3)
    assert works.decode_bound(shape, "bf16", 128, 1, 1e15, 435e9) == pytest.approx(435e9 / 200.2e6, rel=1e-2)


def test_ratios_are_of_the_same_round_and_bounds_of_the_same_run(program: Load) -> None:
    found = {
        (cell["workload"], cell["engine"]): cell
        for cell in program("cpu_peers.report").cells(document(program))
    }
    assert found["a", "kvpage"]["median"] == pytest.approx((127 / 1 + 127 / 2) / 2)
    assert found["b", "vllm"]["kvpage_ratio"] == pytest.approx((2.0 + 1.0) / 2)
    own = found["d", "kvpage"]
    assert own["of_bound"] == pytest.approx(own["median"] / own["bound"])
    assert (own["least"], own["most"]) == (512, 1024)


def test_tables_and_charts_show_every_cell_and_escape_names(program: Load) -> None:
    given = document(program)
    report, chart = program("cpu_peers.report"), program("cpu_peers.chart")
    found = report.cells(given)
    table = report.speed_table(found)
    assert table.count("\n") == 5
    assert "**1.50** (vllm)" in table
    assert "| S bfloat16 | kvpage 1.0 |" in report.engine_table(given, found)
    for picture in (
        chart.bars(found, "S", given["machine"]["processor"]),
        chart.scaling_lines(given, "S", "bf16", given["machine"]["processor"]),
    ):
        texts = [element.text for element in ElementTree.fromstring(picture).iter() if element.text]
        assert any("a <processor>" in text for text in texts)


def test_the_page_says_what_the_committed_results_say(program: Load) -> None:
    stale = [
        path.name
        for path, text in program("cpu_report").pages().items()
        if path.read_text(encoding="utf-8") != text
    ]
    assert stale == []


WORKER = """
import json, sys, time
print(json.dumps({"version": "0"}), flush=True)
for line in sys.stdin:
    end = time.monotonic() + 0.05
    while time.monotonic() < end: pass
    print(line.strip() if "fail" not in line else json.dumps({"error": "no"}), flush=True)
    if "end" in line: break
    while True:
        if __import__("select").select([sys.stdin], [], [], 0)[0]: break
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_worker_that_spins_while_it_waits_is_stopped_between_questions(
    program: Load, tmp_path: Path
) -> None:
    machine = program("cpu_peers.machine")
    with open(tmp_path / "log", "wb") as log:
        worker = machine.Worker([sys.executable, "-c", WORKER], {}, log, patience=20.0)
        try:
            assert worker.hello == {"version": "0"}
            assert worker.ask({"number": 1}) == {"number": 1}
            stat = Path(f"/proc/{worker.process_id}/stat")
            until = time.monotonic() + 5
            while stat.read_text().rsplit(")", 1)[1].split()[0] != "T":
                assert time.monotonic() < until
            assert worker.peak_memory() > 2**20
            with pytest.raises(machine.WorkerError, match="no"):
                worker.ask({"fail": True})
            worker.ask({"end": True})
            with pytest.raises(machine.WorkerError, match="ended"):
                worker.ask({"number": 2})
        finally:
            worker.close()


def test_a_job_names_the_first_checkpoint_that_exists_or_says_what_is_missing(
    program: Load, tmp_path: Path
) -> None:
    serving = program("cpu_peers.serving")
    (tmp_path / "S-bf16").mkdir()
    job = serving.Job(models=tmp_path, model="S", dtype="fp32", threads=1)
    assert job.find("fp32", "bf16") == tmp_path / "S-bf16"
    with pytest.raises(SystemExit, match="there is none"):
        job.find("vllm-int8")
