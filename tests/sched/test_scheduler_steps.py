"""What a step holds: the budget, chunks, who goes first, who gives way."""

from __future__ import annotations

import pytest
from sched_bench import Bench, rows

from kvpage.api.scheduling import ScheduledRequest, SchedulingPolicy
from kvpage.cache.tables import GroupConfig
from kvpage.sched.plan import StepResult
from kvpage.sched.policy import PriorityFirst


def test_nothing_to_do_is_no_plan() -> None:
    assert Bench().scheduler.schedule() is None


def test_a_prompt_is_computed_in_one_step_and_then_each_step_gives_a_token() -> None:
    bench = Bench()
    request = bench.submit(10, max_tokens=3)
    plans = [bench.step() for _ in range(3)]
    assert [rows(plan) for plan in plans] == [[(0, 0, 10)], [(0, 10, 1)], [(0, 11, 1)]]
    assert [plan.num_short for plan in plans] == [0, 1, 1]
    assert request.sequences[0].output_token_ids == [1010, 1011, 1012]
    assert bench.finished == request.sequences
    assert not bench.scheduler.has_work


def test_a_prompt_longer_than_the_budget_is_computed_in_chunks() -> None:
    bench = Bench(tokens=8)
    bench.submit(20, max_tokens=2)
    plans = [bench.step() for _ in range(4)]
    assert [rows(plan) for plan in plans] == [[(0, 0, 8)], [(0, 8, 8)], [(0, 16, 4)], [(0, 20, 1)]]
    assert [list(plan.num_logits) for plan in plans] == [[0], [0], [1], [1]]
    assert [len(plan.sample_slots) for plan in plans] == [0, 0, 1, 1]


def test_a_long_prompt_never_starves_those_that_decode() -> None:
    bench = Bench(tokens=8, seqs=4)
    early = [bench.submit(2, max_tokens=20) for _ in range(3)]
    bench.step()
    bench.submit(60, max_tokens=2)
    for expected in range(2, 12):
        plan = bench.step()
        assert [r.sequences[0].num_output for r in early] == [expected] * 3
        assert plan.num_tokens == 8


def test_more_sequences_than_the_budget_never_run_at_once() -> None:
    bench = Bench(tokens=3, seqs=8)
    for _ in range(6):
        bench.submit(2, max_tokens=4)
    while bench.scheduler.has_work:
        bench.step()
        assert bench.scheduler.num_running <= 3
    assert len(bench.finished) == 6


def test_one_sequence_takes_at_most_the_threshold_a_step() -> None:
    bench = Bench(tokens=32, threshold=6)
    bench.submit(10, max_tokens=2)
    bench.submit(4, max_tokens=2)
    assert rows(bench.step()) == [(0, 0, 6), (1, 0, 4)]
    assert rows(bench.step()) == [(1, 4, 1), (0, 6, 4)]


def test_rows_of_one_token_come_first() -> None:
    bench = Bench(tokens=9)
    bench.submit(10, max_tokens=9)  # the second chunk is one token, and draws
    bench.submit(12, max_tokens=9)
    bench.step()
    plan = bench.step()
    assert rows(plan) == [(0, 9, 1), (1, 0, 8)]
    assert (plan.num_short, list(plan.num_logits), list(plan.sample_rows)) == (1, [1, 0], [0])


def test_a_chunk_of_one_token_that_does_not_end_the_prompt_draws_nothing() -> None:
    bench = Bench(tokens=1)
    bench.submit(3, max_tokens=2)
    plan = bench.step()
    assert (plan.num_short, list(plan.num_logits), list(plan.sample_slots)) == (1, [0], [])
    bench.drain()
    assert bench.finished[0].num_output == 2


def test_first_come_is_first_served_even_if_a_later_one_would_fit() -> None:
    bench = Bench(blocks=6, block_size=4)
    bench.submit(12, max_tokens=4)
    big, small = bench.submit(16, max_tokens=4), bench.submit(2, max_tokens=1)
    bench.step()
    assert [s.request for s in bench.scheduler.waiting] == [big, small]


def test_who_waits_is_let_in_once_all_its_tokens_fit_and_not_when_a_first_chunk_does() -> None:
    bench = Bench(blocks=10, block_size=4, tokens=8)
    first, second = bench.submit(20, max_tokens=1), bench.submit(24, max_tokens=1)
    while not first.finished:
        bench.step()
        assert second.first_scheduled is None
    bench.drain()
    assert bench.scheduler.preemptions == 0


def test_who_waits_leaves_a_block_to_each_that_still_grows() -> None:
    bench = Bench(blocks=6, block_size=4, caching=False)
    growing = bench.submit(9, max_tokens=5)  # will want a fourth block
    bench.step()
    waiting = bench.submit(12, max_tokens=1)
    bench.step()
    assert waiting.first_scheduled is None
    bench.drain()
    assert (growing.preemptions, waiting.preemptions) == (0, 0)

    bench = Bench(blocks=6, block_size=4, caching=False)
    bench.submit(9, max_tokens=4)  # has all it ever needs
    bench.step()
    waiting = bench.submit(12, max_tokens=1)
    bench.step()
    assert waiting.finished


def test_nobody_is_let_in_by_a_step_that_preempts() -> None:
    bench = Bench(blocks=5, block_size=4, policy=PriorityFirst(), caching=False)
    bench.submit(8, priority=1, max_tokens=8)
    victim = bench.submit(8, priority=2, max_tokens=8)
    bench.step()
    bench.submit(1, priority=0, max_tokens=1)
    plan = bench.step()
    assert (victim.preemptions, plan.admissions) == (1, [])
    assert len(bench.step().admissions) == 1


def test_a_lower_priority_number_goes_first_and_ties_go_by_arrival() -> None:
    bench = Bench(seqs=1, policy=PriorityFirst())
    names = {"late": 1, "first": 0, "urgent": -1, "second": 0}
    for name, priority in names.items():
        bench.submit(3, name=name, priority=priority, max_tokens=1)
    bench.drain()
    assert [s.request.request_id for s in bench.finished] == ["urgent", "first", "second", "late"]


def test_a_policy_of_ones_own_decides_who_is_first() -> None:
    class ShortestPromptFirst(SchedulingPolicy):
        def key(self, request: ScheduledRequest) -> int:
            return len(request.prompt_token_ids)

    bench = Bench(seqs=1, policy=ShortestPromptFirst())
    for length in (9, 3, 6):
        bench.submit(length, name=str(length), max_tokens=1)
    bench.drain()
    assert [s.request.request_id for s in bench.finished] == ["3", "6", "9"]


def test_the_last_in_order_gives_way_when_blocks_are_short_and_is_recomputed() -> None:
    bench = Bench(blocks=6, block_size=4, caching=False)
    old, new = bench.submit(8, max_tokens=16), bench.submit(8, max_tokens=16)
    outputs = []
    while not old.finished:
        bench.step()
        outputs.append(new.sequences[0].num_output)
    assert (old.preemptions, new.preemptions, bench.scheduler.preemptions) == (0, 1, 1)
    bench.drain()
    assert new.sequences[0].output_token_ids == [1000 + position for position in range(8, 24)]
    assert bench.blocks.used_blocks == 0


def test_who_asks_for_a_block_gives_way_itself_when_it_is_the_last_in_order() -> None:
    bench = Bench(blocks=5, block_size=4, caching=False)
    old, new = bench.submit(8, max_tokens=8), bench.submit(8, max_tokens=8)
    bench.step()
    plan = bench.step()  # each needs a third block, and there is one
    assert (old.preemptions, new.preemptions) == (0, 1)
    assert [row[0] for row in rows(plan)] == [0]
    assert list(plan.released) == [1]
    bench.drain()
    assert len(bench.finished) == 2


def test_by_priority_the_least_urgent_gives_way_though_it_came_first() -> None:
    bench = Bench(blocks=6, block_size=4, policy=PriorityFirst(), caching=False)
    lazy, urgent = bench.submit(8, priority=5, max_tokens=16), bench.submit(8, priority=1, max_tokens=16)
    bench.drain()
    assert (lazy.preemptions, urgent.preemptions) == (1, 0)
    assert [s.request for s in bench.finished] == [urgent, lazy]


def test_a_preempted_sequence_waits_ahead_of_those_that_came_after_it() -> None:
    bench = Bench(blocks=5, block_size=4, caching=False)
    bench.submit(8, max_tokens=12)
    second, third = bench.submit(8, max_tokens=12), bench.submit(8, max_tokens=1)
    while not second.preemptions:
        bench.step()
    assert [s.request for s in bench.scheduler.waiting] == [second, third]


def test_a_preempted_sequence_hits_its_own_blocks_when_it_comes_back() -> None:
    bench = Bench(blocks=7, block_size=4)
    bench.submit(8, max_tokens=12)
    second = bench.submit(8, max_tokens=12)
    while not second.preemptions:
        bench.step()
    assert second.cached_tokens == 0
    hits = bench.blocks.hits
    bench.drain()
    assert bench.blocks.hits > hits
    assert second.sequences[0].output_token_ids == [1000 + position for position in range(8, 20)]


def test_a_burst_with_a_common_prefix_computes_it_once_in_one_step() -> None:
    bench = Bench(block_size=4, tokens=256)
    prefix = list(range(40))
    burst = [bench.submit([*prefix, 500 + number], max_tokens=2) for number in range(6)]
    plan = bench.step()
    assert sorted(plan.counts) == [1, 1, 1, 1, 1, 41]
    assert [r.cached_tokens for r in burst] == [0] + [40] * 5
    assert bench.blocks.used_blocks == 10 + 6


def test_tenants_with_other_salts_share_nothing() -> None:
    bench = Bench()
    prompt = list(range(20))
    requests = [bench.submit(prompt, salt=salt, max_tokens=1) for salt in ("a", "b", "a", None)]
    bench.drain()
    assert [r.cached_tokens for r in requests] == [0, 0, 16, 0]


def test_what_a_failed_step_published_is_never_hit() -> None:
    bench = Bench()
    prompt = list(range(20))
    bench.submit(prompt, max_tokens=2)
    plan = bench.schedule()
    assert bench.blocks.cached_blocks == 5
    bench.runner.execute_with_garbage(plan)
    bench.scheduler.fail(plan)
    bench.scheduler.check()
    assert bench.blocks.cached_blocks == 0
    again = bench.submit(prompt, max_tokens=2)
    bench.drain()  # the runner compares what the rows find
    assert again.cached_tokens == 16
    assert len(bench.finished) == 2


def test_a_failed_step_keeps_what_earlier_steps_computed() -> None:
    bench = Bench(tokens=8)
    request = bench.submit(20, max_tokens=3)
    bench.step()
    bench.scheduler.fail(bench.schedule())
    assert bench.blocks.cached_blocks == 2
    bench.drain()
    assert request.sequences[0].output_token_ids == [1020, 1021, 1022]


def test_slots_that_a_failed_plan_released_are_named_again() -> None:
    bench = Bench(seqs=3)
    bench.submit(4, max_tokens=1)
    bench.submit(4, max_tokens=9)
    bench.step()
    plan = bench.schedule()
    assert list(plan.released) == [0]
    bench.scheduler.fail(plan)  # and the runner never saw it
    assert set(bench.schedule().released) == {0, 1}


def test_blocks_that_sampled_tokens_fill_are_published_too() -> None:
    bench = Bench(block_size=4)
    request = bench.submit(6, max_tokens=7)
    bench.drain()
    follower = bench.submit([*request.sequences[0].token_ids, 5], max_tokens=1)
    bench.drain()
    assert follower.cached_tokens == 12


def test_prompt_logprobs_take_no_hit_and_come_once_for_the_whole_prompt() -> None:
    bench = Bench(tokens=8)
    prompt = list(range(20))
    bench.submit(prompt, max_tokens=1)
    bench.drain()
    request = bench.submit(prompt, max_tokens=2, prompt_logprobs=0)
    delivered = []
    while bench.scheduler.has_work:
        plan = bench.schedule()
        assert all(logits == count for logits, count in zip(plan.num_logits, plan.counts, strict=True))
        delivered += bench.commit(plan).prompt_logprobs
    assert request.cached_tokens == 0
    ((owner, entries),) = delivered
    assert owner is request
    assert entries[0] is None
    assert [next(iter(entry)) for entry in entries[1:] if entry is not None] == prompt[1:]


def test_a_window_model_runs_longer_than_its_pool() -> None:
    bench = Bench(block_size=4, groups=[GroupConfig("window", 8, 8)], length=400, tokens=8)
    requests = [bench.submit(30, max_tokens=100) for _ in range(3)]
    bench.drain(2000)
    assert all(r.sequences[0].num_output == 100 for r in requests)


@pytest.mark.parametrize("block_size", [1, 64])
def test_any_block_size_works(block_size: int) -> None:
    bench = Bench(block_size=block_size, length=30, blocks=40)
    requests = [bench.submit(length, max_tokens=40) for length in (1, 7, 29)]
    bench.drain()
    assert [len(r.sequences[0].token_ids) for r in requests] == [30, 30, 30]


def test_a_plan_is_committed_once_and_before_the_next() -> None:
    bench = Bench()
    bench.submit(4, max_tokens=3)
    plan = bench.schedule()
    with pytest.raises(RuntimeError, match="before the last plan"):
        bench.scheduler.schedule()
    bench.commit(plan)
    with pytest.raises(RuntimeError, match="not under way"):
        bench.scheduler.commit(plan, StepResult([1]))


def test_a_snapshot_names_every_sequence_and_its_blocks() -> None:
    bench = Bench(seqs=1, block_size=4)
    bench.submit(6, name="a", max_tokens=3)
    bench.submit(6, name="b", max_tokens=3)
    bench.step()
    snapshot = bench.scheduler.snapshot()
    (running,), (waiting,) = snapshot.running, snapshot.waiting
    assert (running.request_id, running.slot, running.known, running.computed) == ("a", 0, 7, 6)
    assert [snapshot.groups[0].blocks[block].references for block in running.tables[0]] == [1, 1]
    assert (waiting.request_id, waiting.slot, waiting.tables) == ("b", -1, [[]])
