"""How sequences end: once, for one reason, with blocks and slot given back."""

from __future__ import annotations

import pytest
from sched_bench import Bench


def test_a_stop_token_ends_with_its_id_and_eos_without_one() -> None:
    bench = Bench()
    plain = bench.submit(4, stops=[1006], max_tokens=9)
    eos = bench.submit(4, eos=[1005], max_tokens=9)
    bench.drain()
    assert [(s.finish_reason, s.stop_reason, s.num_output) for r in (plain, eos) for s in r.sequences] == [
        ("stop", 1006, 3),
        ("stop", None, 2),
    ]


def test_a_stop_token_wins_over_the_length_that_it_reaches() -> None:
    bench = Bench()
    request = bench.submit(4, stops=[1006], max_tokens=3)
    bench.drain()
    assert request.sequences[0].finish_reason == "stop"


def test_a_stop_token_before_min_tokens_does_not_count() -> None:
    bench = Bench()
    request = bench.submit(4, stops=[1004], min_tokens=2, max_tokens=5)
    bench.drain()
    assert (request.sequences[0].finish_reason, request.sequences[0].num_output) == ("length", 5)


def test_the_engine_may_end_a_sequence_after_any_commit() -> None:
    bench = Bench()
    request, other = bench.submit(4, max_tokens=9), bench.submit(4, max_tokens=9)
    bench.step()
    bench.step()
    bench.scheduler.finish(request.sequences[0], "stop", "###")
    bench.scheduler.finish(request.sequences[0], "abort")
    bench.scheduler.check()
    assert (request.sequences[0].finish_reason, request.sequences[0].stop_reason) == ("stop", "###")
    plan = bench.step()
    assert list(plan.released) == [0]
    bench.drain()
    assert bench.finished == other.sequences


def test_what_ends_while_its_step_is_under_way_is_not_reported_again() -> None:
    bench = Bench()
    request, other = bench.submit(4, max_tokens=9), bench.submit(4, max_tokens=9)
    plan = bench.schedule()
    assert bench.scheduler.abort(request) == request.sequences
    bench.scheduler.check()
    assert bench.blocks.used_blocks == 2  # the step may still write there
    commit = bench.commit(plan)
    assert commit.sequences == other.sequences
    assert commit.finished == []
    assert (request.sequences[0].num_output, bench.blocks.used_blocks) == (0, 1)


def test_an_error_of_one_row_ends_that_sequence_alone() -> None:
    bench = Bench()
    bad, good = bench.submit(4, max_tokens=3), bench.submit(4, max_tokens=3)
    plan = bench.schedule()
    result = bench.runner.execute(plan)
    result.errors = {0: "a logits processor raised ValueError"}
    result.logprobs = [None, {1: None}]  # type: ignore[dict-item]
    commit = bench.scheduler.commit(plan, result)
    bench.scheduler.check()
    assert commit.finished == bad.sequences
    assert (bad.sequences[0].finish_reason, bad.sequences[0].error) == (
        "error",
        "a logits processor raised ValueError",
    )
    assert (commit.sequences, commit.token_ids, commit.logprobs) == (good.sequences, [1004], [{1: None}])
    bench.drain()
    assert good.sequences[0].finish_reason == "length"


@pytest.mark.parametrize("running", [True, False])
def test_a_timeout_ends_a_request_with_what_it_has(running: bool) -> None:
    bench = Bench(seqs=1)
    first = bench.submit(4, timeout=10.0, max_tokens=50)
    second = bench.submit(4, timeout=10.0 if not running else None, max_tokens=2)
    bench.step()
    bench.step()
    bench.now = 9.0
    assert bench.scheduler.expire() == []
    bench.now = 10.0
    expected = first.sequences if running else first.sequences + second.sequences
    assert bench.scheduler.expire() == expected
    bench.scheduler.check()
    assert all((s.finish_reason, s.stop_reason) == ("length", "timeout") for s in expected)
    assert first.sequences[0].num_output == 2
    assert bench.scheduler.expire() == []
    bench.drain()


def test_many_long_timeouts_of_ended_requests_do_not_pile_up() -> None:
    bench = Bench()
    for _ in range(100):
        bench.submit(2, timeout=1e6, max_tokens=1)
        bench.drain()
    assert len(bench.scheduler._deadlines) < 40


def test_times_and_counts_of_a_request_are_kept() -> None:
    bench = Bench(seqs=1)
    prompt = list(range(9))
    bench.submit(prompt, max_tokens=2)
    second = bench.submit(prompt, max_tokens=2)
    assert second.first_scheduled is None
    bench.step()
    bench.step()
    bench.now = 3.0
    bench.step()
    assert (second.first_scheduled, second.cached_tokens, second.preemptions) == (3.0, 8, 0)


def test_a_slot_is_named_as_released_before_it_is_given_out_again() -> None:
    bench = Bench(seqs=1)
    for _ in range(3):
        bench.submit(4, max_tokens=1)
    plans = [bench.step() for _ in range(3)]
    assert [(list(p.released), [a.slot for a in p.admissions]) for p in plans] == [
        ([], [0]),
        ([0], [0]),
        ([0], [0]),
    ]
