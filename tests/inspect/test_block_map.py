"""The block map shows what the scheduler holds, in text and as a picture."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

import pytest

from kvpage.cache.manager import BlockManager
from kvpage.cache.tables import GroupConfig
from kvpage.inspect.snapshot import BlockMap, take_snapshot
from kvpage.params import SamplingParams
from kvpage.sched.admission import SchedulerConfig
from kvpage.sched.plan import StepResult
from kvpage.sched.scheduler import Scheduler
from kvpage.sched.sequence import Request

BLOCK = 4
SVG = "{http://www.w3.org/2000/svg}"


def make_scheduler(num_blocks: int = 33) -> Scheduler:
    blocks = BlockManager(block_size=BLOCK, groups=[GroupConfig("full", num_blocks)], hash_key=b"k")
    return Scheduler(SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=64, max_model_len=64), blocks)


def submit(scheduler: Scheduler, name: str, prompt: list[int], *, n: int = 1, max_tokens: int = 8) -> None:
    params = SamplingParams(n=n, max_tokens=max_tokens).with_defaults({})
    scheduler.submit(Request(name, prompt, params, seed=0, arrival=0.0))


def steps(scheduler: Scheduler, count: int) -> None:
    for _ in range(count):
        plan = scheduler.schedule()
        assert plan is not None
        scheduler.commit(plan, StepResult([100 + plan.step] * len(plan.sample_slots)))


def run_to_the_end(scheduler: Scheduler) -> None:
    while scheduler.has_work:
        steps(scheduler, 1)


def states(block_map: BlockMap) -> dict[str, int]:
    group = block_map.groups[0]
    return {state: group.count(state) for state in ("free", "cached", "used", "shared")}


def test_an_idle_pool_is_all_free() -> None:
    block_map = take_snapshot(make_scheduler())
    assert states(block_map) == {"free": 32, "cached": 0, "used": 0, "shared": 0}
    assert block_map.sequences == ()
    assert "no sequences" in block_map.to_text()


def test_each_block_names_its_owner_and_its_place_in_the_table() -> None:
    scheduler = make_scheduler()
    submit(scheduler, "alone", list(range(10)))
    steps(scheduler, 1)
    block_map = take_snapshot(scheduler)
    (sequence,) = block_map.sequences
    assert (sequence.request_id, sequence.state, sequence.known, sequence.computed) == (
        "alone",
        "running",
        11,
        10,
    )
    blocks = {block.number: block for block in block_map.groups[0].blocks}
    held = [blocks[number] for number in sequence.tables[0]]
    assert [(block.owners[0].request_id, block.owners[0].index) for block in held] == [
        ("alone", 0), ("alone", 1), ("alone", 2),
    ]  # fmt: skip
    assert [block.filled for block in held] == [4, 4, 2]


def test_blocks_of_a_prompt_with_several_choices_are_shared() -> None:
    scheduler = make_scheduler()
    submit(scheduler, "many", list(range(9)), n=3)
    steps(scheduler, 2)
    block_map = take_snapshot(scheduler)
    shared = [block for block in block_map.groups[0].blocks if block.state == "shared"]
    assert len(shared) == 2
    assert all({owner.choice for owner in block.owners} == {0, 1, 2} for block in shared)
    assert len({sequence.slot for sequence in block_map.sequences}) == 3


def test_blocks_of_a_finished_request_stay_cached_and_nothing_is_lost() -> None:
    scheduler = make_scheduler()
    submit(scheduler, "gone", list(range(9)))
    run_to_the_end(scheduler)
    counts = states(take_snapshot(scheduler))
    assert counts["cached"] >= 2
    assert counts["used"] == counts["shared"] == 0
    assert sum(counts.values()) == 32


def test_the_summary_counts_cached_blocks_as_the_block_manager_does() -> None:
    scheduler = make_scheduler()
    submit(scheduler, "gone", list(range(9)), max_tokens=1)
    run_to_the_end(scheduler)
    submit(scheduler, "held", list(range(50, 63)))
    steps(scheduler, 1)
    block_map = take_snapshot(scheduler)
    kept, known = states(block_map)["cached"], scheduler.snapshot().groups[0].blocks
    cached = sum(block.cached for block in known)
    assert (kept, cached) == (2, 5)
    assert f"{kept} kept for a prefix hit ({cached} with those in use)" in block_map.to_text()


def test_a_waiting_sequence_is_listed_without_slot_and_blocks() -> None:
    scheduler = make_scheduler()
    submit(scheduler, "later", [1, 2, 3])
    (sequence,) = take_snapshot(scheduler).sequences
    assert (sequence.state, sequence.slot, sequence.tables) == ("waiting", -1, ((),))


def test_text_has_one_character_a_block_and_a_line_a_sequence() -> None:
    scheduler = make_scheduler()
    submit(scheduler, "first", list(range(9)), n=2)
    submit(scheduler, "second", list(range(50, 55)))
    steps(scheduler, 2)
    text = take_snapshot(scheduler).to_text(width=32)
    row = text.splitlines()[1].split()[1]
    assert len(row) == 32
    assert row.count("#") == 2
    assert text.isascii()
    assert [line.split()[1] for line in text.splitlines()[-3:]] == ["first/0", "first/1", "second/0"]


def test_a_large_free_pool_takes_one_line_of_text() -> None:
    scheduler = make_scheduler(num_blocks=100_001)
    submit(scheduler, "small", [1, 2, 3])
    steps(scheduler, 1)
    text = take_snapshot(scheduler).to_text(width=64)
    assert "(99,936 free)" in text
    assert len(text.splitlines()) < 8


@pytest.mark.parametrize("columns", [16, 64])
def test_the_picture_is_well_formed_and_each_block_has_a_tooltip(columns: int) -> None:
    scheduler = make_scheduler()
    submit(scheduler, "<a & b>", list(range(9)), n=2)
    steps(scheduler, 2)
    root = ElementTree.fromstring(take_snapshot(scheduler).to_svg(columns))
    titles = [title.text or "" for title in root.iter(f"{SVG}title")]
    assert sum("<a & b>/1" in title for title in titles) == 3
    assert sum(": shared" in title for title in titles) == 2
    assert len(titles) % columns == 0 or len(titles) == 32


def test_a_window_group_says_so() -> None:
    blocks = BlockManager(block_size=BLOCK, groups=[GroupConfig("window", 17, window=8)], hash_key=b"k")
    scheduler = Scheduler(
        SchedulerConfig(max_num_seqs=2, max_num_batched_tokens=16, max_model_len=64), blocks
    )
    submit(scheduler, "long", list(range(30)), max_tokens=30)
    steps(scheduler, 6)
    block_map = take_snapshot(scheduler)
    assert "window 8" in block_map.to_text()
    assert 0 in block_map.sequences[0].tables[0]
