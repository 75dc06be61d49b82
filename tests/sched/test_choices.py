"""n > 1: the prompt is computed once, its blocks are shared, and after that every choice lives alone."""

from __future__ import annotations

import pytest
from sched_bench import Bench, rows


def by_stream(seed: int, position: int, stream: int, known: list[int]) -> int:
    return 1000 * (stream + 1) + position


def test_four_choices_use_the_prompts_blocks_once_and_copy_at_most_one_block_a_fork() -> None:
    bench = Bench(block_size=16, blocks=40, tokens=256, draw=by_stream)
    request = bench.submit(100, n=4, max_tokens=8)
    bench.step()
    assert bench.blocks.used_blocks == 7
    assert (bench.blocks.forks, bench.blocks.copies, bench.scheduler.num_running) == (3, 0, 4)
    bench.step()
    assert bench.blocks.used_blocks == 7 + 3  # the partly filled last block, once for each
    bench.drain()
    assert bench.blocks.copies == 3
    for index, sequence in enumerate(request.sequences):
        assert sequence.output_token_ids == [1000 * (index + 1) + position for position in range(100, 108)]


def test_a_prompt_that_ends_with_a_block_needs_no_copy() -> None:
    bench = Bench(block_size=4, draw=by_stream)
    bench.submit(8, n=4, max_tokens=3)
    bench.drain()
    assert (bench.blocks.forks, bench.blocks.copies) == (3, 0)


def test_the_first_tokens_of_all_choices_come_from_the_same_step() -> None:
    bench = Bench(tokens=8, draw=by_stream)
    request = bench.submit(12, n=3, max_tokens=4)
    plan = bench.step()
    assert (len(plan.forks), len(plan.sample_slots)) == (0, 0)
    plan = bench.step()
    assert rows(plan) == [(0, 8, 4)]
    assert list(plan.sample_rows) == [0, 0, 0]
    assert [fork.child for fork in plan.forks] == list(plan.sample_slots)[1:]
    assert [s.num_output for s in request.sequences] == [1, 1, 1]


def test_admission_waits_until_every_choice_has_a_slot() -> None:
    bench = Bench(seqs=3)
    first = bench.submit(4, max_tokens=5)
    second = bench.submit(4, n=3, max_tokens=2)
    while not first.finished:
        bench.step()
        assert second.first_scheduled is None
    bench.step()
    assert bench.scheduler.num_running == 3
    bench.drain()
    assert second.finished


def test_choices_beyond_the_slots_run_later_and_say_the_same() -> None:
    def run(seqs: int) -> list[list[int]]:
        bench = Bench(seqs=seqs, draw=by_stream)
        request = bench.submit(10, n=5, max_tokens=6)
        bench.drain()
        bench.scheduler.check()
        return [s.output_token_ids for s in request.sequences]

    assert run(1) == run(2) == run(3) == run(8)


def test_choices_say_the_same_when_preempted() -> None:
    def run(blocks: int) -> tuple[list[list[int]], int]:
        bench = Bench(blocks=blocks, block_size=2, draw=by_stream)
        request = bench.submit(5, n=4, max_tokens=10)
        bench.drain()
        return [s.output_token_ids for s in request.sequences], request.preemptions

    roomy, tight = run(60), run(9)
    assert roomy[0] == tight[0]
    assert (roomy[1], tight[1] > 0) == (0, True)


def test_a_choice_that_ends_at_once_leaves_the_others_alive() -> None:
    bench = Bench(draw=by_stream)
    request = bench.submit(4, n=3, max_tokens=3, stops=[1004])  # choice 0 draws 1004 first
    bench.step()
    assert [s.finish_reason for s in request.sequences] == ["stop", None, None]
    bench.drain()
    assert [s.num_output for s in request.sequences] == [1, 3, 3]
    assert len(bench.finished) == 3


@pytest.mark.parametrize("steps", [0, 1, 2, 3])
def test_abort_at_any_point_ends_every_choice_once(steps: int) -> None:
    bench = Bench(tokens=4, seqs=4)
    request = bench.submit(7, n=4, max_tokens=9)
    for _ in range(steps):
        bench.step()
    assert bench.scheduler.abort(request) == request.sequences
    assert bench.scheduler.abort(request) == []
    bench.scheduler.check()
    assert {s.finish_reason for s in request.sequences} == {"abort"}
    assert not bench.scheduler.has_work
    assert bench.blocks.used_blocks == 0


def test_when_choice_0_fails_before_the_fork_the_others_go_on() -> None:
    bench = Bench(tokens=4, draw=by_stream)
    request = bench.submit(7, n=3, max_tokens=2)
    bench.step()
    bench.scheduler.finish(request.sequences[0], "error")
    bench.drain()
    assert [s.finish_reason for s in request.sequences] == ["error", "length", "length"]


def test_a_choice_that_was_ended_before_the_fork_is_never_born() -> None:
    bench = Bench(tokens=4)
    request = bench.submit(7, n=3, max_tokens=2)
    bench.step()
    bench.scheduler.finish(request.sequences[1], "abort")
    plan = bench.step()
    assert [fork.stream for fork in plan.forks] == [2]
    bench.drain()
    assert len(bench.finished) == 2
