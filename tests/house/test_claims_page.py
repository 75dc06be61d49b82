"""docs/claims.md: no claim is missing, its commands run, and what it says is what they say."""

from __future__ import annotations

import importlib
import json
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvpage.cache.manager import BlockManager
from kvpage.cache.tables import GroupConfig
from kvpage.cli.main import main
from kvpage.sched.plan import StepPlan

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = ROOT / "benchmarks" / "claims"
PAGE = (ROOT / "docs" / "claims.md").read_text(encoding="utf-8")
VERDICTS = {"reproduced", "bounded", "refuted", "not testable here"}
PLAN_ROWS = re.findall(
    r"^\| [^|]+ \| `kvpage (plan [^`]+)` \| ([^|]*) \|([^|]*)\|$", PAGE, flags=re.MULTILINE
)
COMMANDS = re.findall(r"^python (benchmarks/claims/\w+\.py.*)$", PAGE, flags=re.MULTILINE)


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Import a program of benchmarks/claims as it is imported when it runs there."""
    monkeypatch.syspath_prepend(str(PROGRAMS))
    before = set(sys.modules)

    def load(name: str) -> ModuleType:
        return importlib.import_module(name)

    yield load
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(PROGRAMS)):
            del sys.modules[name]


def rows() -> dict[str, list[str]]:
    """Q -> the cells after it: claim, verdict, figure, link."""
    found = re.findall(r"^\| (Q\d+) \| (S\d.*) \|$", PAGE, flags=re.MULTILINE)
    return {number: [cell.strip() for cell in rest.split(" | ")] for number, rest in found}


def test_every_claim_has_a_row_a_verdict_and_a_section() -> None:
    claims = rows()
    assert list(claims) == [f"Q{number}" for number in range(1, 19)]
    headings = {line.lower().replace(" ", "-") for line in re.findall(r"^## (.+)$", PAGE, flags=re.MULTILINE)}
    for number, (_claim, verdict, figure, link) in claims.items():
        assert verdict in VERDICTS, number
        assert figure, number
        target = re.fullmatch(r"\[[^]]+\]\(#([\w-]+)\)", link)
        assert target, number
        assert target.group(1) in headings, number
        assert re.search(rf"\b{number}\b", PAGE.split("\n## ", 1)[1]), number


def test_every_program_is_on_the_page() -> None:
    named = {Path(command.split()[0]).stem for command in COMMANDS}
    assert {path.stem for path in PROGRAMS.glob("*.py")} - named == {"report"}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_names_a_program_that_takes_its_arguments(
    command: str, program: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, *arguments = shlex.split(command)
    monkeypatch.setattr(sys, "argv", [path, *arguments, "--help"])
    with pytest.raises(SystemExit) as stop:
        program(Path(path).stem).main()
    assert stop.value.code == 0
    assert f"python {path}" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["roofline", "attention_and_links"])
def test_the_page_repeats_the_verdicts_of_the_quick_programs(
    name: str, program: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [name])
    program(name).main()
    verdict = capsys.readouterr().out.strip().splitlines()[-1]
    assert f"\n{verdict}\n" in PAGE


def test_the_page_repeats_the_table_of_block_sizes(
    program: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["block_waste", "--json"])
    program("block_waste").main()
    (table,) = json.loads(capsys.readouterr().out)["tables"].values()
    printed = {
        line["block size"]: [value for head, value in line.items() if head != "bound"][1:] for line in table
    }
    shown = re.findall(r"^\| (\d+) \| (\d+) \| ([\d.]+) % \| ([\d.]+) % \| ([\d.]+) % \|$", PAGE, flags=re.M)
    assert len(shown) == 5
    for size, *figures in shown:
        assert [float(figure) for figure in figures] == printed[int(size)]


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which build/shapes holds the published configs."""
    folder = tmp_path_factory.mktemp("claims")
    sys.path.insert(0, str(PROGRAMS))
    try:
        importlib.import_module("model_shapes").write_shapes(folder / "build" / "shapes")
    finally:
        sys.path.remove(str(PROGRAMS))
    return folder


@pytest.mark.parametrize(("command", "left", "longest"), PLAN_ROWS, ids=[row[0] for row in PLAN_ROWS])
def test_every_plan_says_what_the_page_says(
    command: str,
    left: str,
    longest: str,
    shapes: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(shapes)
    status = main(shlex.split(command))
    output = capsys.readouterr()
    if left == "refused":
        assert status == 2
        assert "beyond the model's context of 4096" in output.err
    elif left == "cannot load":
        assert status == 1
        assert "\ncannot load" in output.out
    else:
        assert status == 0
        assert f"fits: about {left} left for KV" in output.out
        assert re.search(
            rf"^ +{longest.strip()} sequences? +of 4,096 tokens  \(max_model_len\)", output.out, flags=re.M
        )


def test_the_page_has_a_plan_for_every_claim_about_sizes() -> None:
    assert len(PLAN_ROWS) == 13


@settings(max_examples=60, deadline=None)
@given(
    block_size=st.sampled_from((1, 2, 7, 16, 64)),
    steps=st.lists(st.tuples(st.sampled_from("agrfe"), st.integers(0, 40), st.integers(0, 9)), max_size=60),
)
def test_no_sequence_ever_leaves_a_whole_block_unused(
    block_size: int, steps: list[tuple[str, int, int]]
) -> None:
    """Q5: at most block_size - 1 slots, after any mix of admitting, growing, rolling back, forking and ending."""
    groups = [GroupConfig("full", 4000 // block_size)]
    manager = BlockManager(block_size=block_size, groups=groups, enable_prefix_caching=False)
    live: list[tuple[Any, int]] = []
    for action, amount, pick in steps:
        index = pick % len(live) if live else 0
        if action == "a" or not live:
            holder = manager.open()
            if manager.admit(holder, 0, amount + 1, 0, amount + 1, StepPlan(0)):
                live.append((holder, amount + 1))
        elif action == "g" and amount:
            holder, length = live[index]
            if manager.allocate(holder, 0, length, amount, StepPlan(0)):
                live[index] = (holder, length + amount)
            manager.drop_copy_sources()
        elif action == "r":
            holder, length = live[index]
            manager.rollback(holder, max(1, length - amount))
            live[index] = (holder, max(1, length - amount))
        elif action == "f":
            holder, length = live[index]
            live.append((manager.fork(holder, 0, StepPlan(0)), length))
        elif action == "e":
            manager.free(live.pop(index)[0])
        for holder, length in live:
            assert 0 <= holder.num_blocks * block_size - length <= block_size - 1
        manager.check()


@pytest.mark.parametrize("block_size", [1, 16, 128])
def test_the_bound_of_a_block_is_met_and_never_exceeded(block_size: int, program: Any) -> None:
    workloads = program("simulation.workloads")
    most, unused, held = program("block_waste").unused_slots(workloads.SHAREGPT.jobs(4000, 1), block_size)
    assert most == block_size - 1
    assert unused < held or block_size == 1


def test_blocks_hold_more_tokens_than_any_contiguous_policy_and_shares_add_up(program: Any) -> None:
    workload = program("simulation.workloads").SHAREGPT
    table = program("contiguous_waste").rows(workload, 40_000, 1)
    *contiguous, paged = table
    assert all(line["tokens %"] < paged["tokens %"] for line in contiguous)
    assert all(line["at once"] < paged["at once"] for line in contiguous)
    for line in table:
        parts = [line[part] for part in ("tokens %", "reserved %", "internal %", "external %")]
        assert min(parts) >= 0
        assert sum(parts) == pytest.approx(100, abs=0.3)
    by_name = {line["allocator"]: line for line in table}
    assert by_name["max_model_len 2048, buddy"]["at once"] == 7.0  # 15,700 // 2,048
    assert by_name["exact length, buddy"]["internal %"] == 0.0
    assert paged["internal %"] < 100 * 15 * paged["at once"] / 15_700


def test_too_few_requests_to_fill_the_pool_are_an_error_not_a_figure(program: Any) -> None:
    workload = program("simulation.workloads").ALPACA
    with pytest.raises(ValueError, match="raise --tokens"):
        program("simulation.serving").serve_paged(workload.jobs(2000, 0))


def test_one_sequence_takes_every_hole_of_a_pool_of_blocks_but_no_run_is_long_enough(program: Any) -> None:
    given_by = {line["allocator"]: line["given"] for line in program("concurrency").scattered(16)}
    assert given_by == {"first fit": "no", "kvpage": "yes"}


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(("FirstFit", "Buddy")),
    slots=st.integers(1, 300),
    steps=st.lists(st.tuples(st.booleans(), st.integers(1, 90)), max_size=60),
)
def test_the_baselines_hand_out_no_slot_twice_and_lose_none(
    name: str, slots: int, steps: list[tuple[bool, int]]
) -> None:
    sys.path.insert(0, str(PROGRAMS))
    try:
        allocator = getattr(importlib.import_module("simulation.allocators"), name)(slots)
    finally:
        sys.path.remove(str(PROGRAMS))
    largest = max(size for size in range(1, slots + 1) if _fits(name, slots, size))
    runs: list[tuple[int, int]] = []
    for takes, amount in steps:
        if takes or not runs:
            run = allocator.take(amount)
            if run is not None:
                assert run[1] >= amount
                runs.append(run)
        else:
            allocator.give_back(*runs.pop(amount % len(runs)))
        places = [place for start, size in runs for place in range(start, start + size)]
        assert len(places) == len(set(places))
        assert all(0 <= place < slots for place in places)
    for run in runs:
        allocator.give_back(*run)
    assert allocator.take(largest) is not None


def _fits(name: str, slots: int, size: int) -> bool:
    """Whether an empty pool has a run of ``size``: a buddy's longest is the largest power of two in it."""
    return size <= (slots if name == "FirstFit" else 1 << (slots.bit_length() - 1))
