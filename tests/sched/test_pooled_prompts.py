"""Prompts that become vectors: scheduled like all others, they draw nothing and end with their vector."""

from __future__ import annotations

import pytest
from fake_runner import vector_of
from sched_bench import Bench, rows

from kvpage.errors import QueueFullError, RequestError, TooLongError
from kvpage.params import Pooling, PoolingParams


def test_a_pooled_prompt_ends_with_the_step_that_computes_it_and_needs_no_logits() -> None:
    bench = Bench()
    request = bench.submit(10, pooling="mean")
    plan = bench.step()
    assert (rows(plan), list(plan.num_logits), list(plan.sample_rows)) == ([(0, 0, 10)], [0], [])
    assert list(plan.pool_rows) == [0]
    sequence = request.sequences[0]
    assert (sequence.finish_reason, sequence.stop_reason, sequence.num_output) == ("stop", None, 0)
    assert not bench.scheduler.has_work
    assert bench.blocks.used_blocks == 0


@pytest.mark.parametrize("pooling", ["mean", "last"])
@pytest.mark.parametrize("length", [1, 2, 33])
def test_chunks_make_the_same_vector(pooling: Pooling, length: int) -> None:
    bench = Bench(tokens=8)
    request = bench.submit(length, pooling=pooling)
    bench.drain()
    assert bench.embeddings == {
        request.request_id: vector_of(pooling, list(request.prompt_token_ids)),
    }


def test_pooled_prompts_share_steps_with_sequences_that_decode() -> None:
    bench = Bench(tokens=16)
    writer = bench.submit(4, max_tokens=20)
    bench.step()
    pooled = bench.submit(20, pooling="mean")
    plans = [bench.step(), bench.step()]
    assert [list(plan.counts) for plan in plans] == [[1, 15], [1, 5]]
    assert [list(plan.pool_rows) for plan in plans] == [[], [1]]
    assert (pooled.finished, writer.sequences[0].num_output) == (True, 3)


def test_a_mean_takes_no_prefix_hit_and_the_last_position_does() -> None:
    bench = Bench(block_size=4)
    prompt = list(range(20))
    bench.submit(prompt, max_tokens=1)
    bench.drain()
    bench.submit(prompt, pooling="mean")
    assert rows(bench.step()) == [(0, 0, 20)]
    bench.submit(prompt, pooling="last")
    assert rows(bench.step()) == [(0, 16, 4)]


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_blocks_of_a_pooled_prompt_are_hit_by_others(pooling: Pooling) -> None:
    bench = Bench(block_size=4)
    prompt = list(range(20))
    bench.submit(prompt, pooling=pooling)
    bench.drain()
    request = bench.submit(prompt, max_tokens=1)
    bench.drain()
    assert request.cached_tokens == 16


def test_a_preempted_mean_starts_over() -> None:
    bench = Bench(blocks=7, block_size=4, tokens=2)
    bench.submit(2, max_tokens=24)
    bench.step()
    pooled = bench.submit(16, pooling="mean")
    bench.drain()
    assert pooled.preemptions == 1
    assert bench.embeddings[pooled.request_id] == vector_of("mean", list(pooled.prompt_token_ids))


def test_a_pooled_prompt_may_fill_the_context_and_the_pool_and_no_more() -> None:
    bench = Bench(length=20)
    bench.submit(20, pooling="mean")
    bench.drain()
    with pytest.raises(TooLongError, match=r"21 input tokens. Shorten the prompt to at most 20") as error:
        bench.submit(21, pooling="mean")
    assert error.value.param == "prompt"
    bench = Bench(blocks=5, block_size=4)
    bench.submit(20, pooling="last")
    bench.drain()
    with pytest.raises(TooLongError, match=r"21 prompt tokens need 6 blocks.*at most 20 tokens") as error:
        bench.submit(21, pooling="last")
    assert error.value.param == "prompt"


def test_the_limits_of_the_queue_count_pooled_prompts() -> None:
    bench = Bench(seqs=1, queued_reqs=1)
    bench.submit(4, pooling="mean")
    bench.submit(4, pooling="last")
    with pytest.raises(QueueFullError):
        bench.submit(4, pooling="mean")


def test_a_fault_of_one_vector_ends_its_request_alone() -> None:
    bench = Bench()
    writer, bad, good = (
        bench.submit(3, max_tokens=2),
        bench.submit(4, pooling="mean"),
        bench.submit(5, pooling="mean"),
    )
    plan = bench.schedule()
    result = bench.runner.execute(plan)
    result.errors = {1: "not finite"}
    commit = bench.scheduler.commit(plan, result)
    assert [(request, len(vector)) for request, vector in commit.embeddings] == [(good, 1)]
    assert (bad.sequences[0].finish_reason, bad.sequences[0].error) == ("error", "not finite")
    assert writer.sequences[0].num_output == 1


@pytest.mark.parametrize(
    ("values", "param"),
    [({"pooling": "max"}, "pooling"), ({"normalize": 1}, "normalize"), ({"timeout": 0}, "timeout")],
)
def test_pooling_params_out_of_range_are_refused(values: dict[str, object], param: str) -> None:
    with pytest.raises(RequestError) as error:
        PoolingParams(**values)  # type: ignore[arg-type]
    assert error.value.param == param
