"""What is refused at submission, and what the refusal says."""

from __future__ import annotations

import pytest
from sched_bench import Bench

from kvpage.api.scheduling import ScheduledRequest, SchedulingPolicy
from kvpage.cache.tables import GroupConfig
from kvpage.errors import ConfigError, QueueFullError, RequestError
from kvpage.sched.admission import SchedulerConfig


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(RequestError, match="empty") as error:
        Bench().submit([])
    assert error.value.param == "prompt"


def test_a_prompt_must_leave_room_for_one_token() -> None:
    bench = Bench(length=20)
    bench.submit(19, max_tokens=50)
    with pytest.raises(
        RequestError,
        match=r"maximum context length is 20 tokens. However, your prompt contains 20 "
        r"input tokens",
    ) as error:
        bench.submit(20)
    assert error.value.param == "prompt"
    bench.drain()
    assert [s.num_output for s in bench.finished] == [1]


@pytest.mark.parametrize("token", [-1, 2**31])
def test_token_ids_outside_of_any_vocabulary_are_refused(token: int) -> None:
    with pytest.raises(RequestError, match=str(token)):
        Bench().submit([1, token, 2])


def test_max_tokens_is_cut_to_the_context() -> None:
    bench = Bench(length=12)
    request = bench.submit(5, max_tokens=500)
    bench.drain()
    assert request.sequences[0].num_output == 7
    assert (request.sequences[0].finish_reason, request.sequences[0].stop_reason) == ("length", None)


def test_what_can_never_fit_is_refused_with_both_numbers_and_the_ways_out() -> None:
    bench = Bench(
        blocks=5, block_size=4
    )  # 20 tokens of KV: sequences of 21, the last token is never computed
    with pytest.raises(RequestError) as error:
        bench.submit(10, max_tokens=12)
    message = str(error.value)
    assert error.value.param == "max_tokens"
    for part in ("6 blocks", "5 blocks", "20 tokens", "at most 11", "num_kv_blocks", "kv_cache_memory"):
        assert part in message
    with pytest.raises(RequestError, match="at most 20 tokens") as error:
        bench.submit(21, max_tokens=1)
    assert error.value.param == "prompt"


def test_what_just_fits_alone_is_served() -> None:
    bench = Bench(blocks=5, block_size=4)
    requests = [
        bench.submit(10, max_tokens=11),
        bench.submit(20, max_tokens=1),
        bench.submit(3, max_tokens=18),
    ]
    bench.drain()
    assert [r.sequences[0].num_output for r in requests] == [11, 1, 18]


def test_without_max_tokens_a_sequence_ends_where_the_pool_does() -> None:
    bench = Bench(blocks=5, block_size=4)
    request = bench.submit(10, max_tokens=None)
    bench.drain()
    assert request.sequences[0].num_output == 11
    with pytest.raises(RequestError) as error:
        bench.submit(21, max_tokens=None)
    assert error.value.param == "prompt"


def test_a_window_needs_no_more_than_the_window_and_a_chunk() -> None:
    bench = Bench(block_size=4, groups=[GroupConfig("window", 5, 6)], length=200, tokens=64)
    request = bench.submit(100, max_tokens=90)
    bench.drain()
    assert request.sequences[0].num_output == 90


def test_a_pool_smaller_than_the_window_takes_what_fits_in_it() -> None:
    bench = Bench(block_size=4, groups=[GroupConfig("window", 4, 50)])
    bench.submit(6, max_tokens=7)
    bench.drain()
    with pytest.raises(RequestError, match="3 blocks"):
        bench.submit(6, max_tokens=8)


def test_an_id_is_free_again_when_its_request_has_ended() -> None:
    bench = Bench()
    bench.submit(4, name="a", max_tokens=1)
    with pytest.raises(RequestError, match="'a'") as error:
        bench.submit(4, name="a")
    assert error.value.param == "request_id"
    bench.drain()
    bench.submit(4, name="a")


def test_a_refused_request_leaves_nothing_behind() -> None:
    bench = Bench(blocks=5)
    with pytest.raises(RequestError):
        bench.submit(10, name="a", max_tokens=100)
    assert not bench.scheduler.has_work
    bench.submit(10, name="a", max_tokens=1)


def test_the_queue_refuses_more_requests_than_may_wait_beyond_the_free_slots() -> None:
    bench = Bench(seqs=2, queued_reqs=1)
    first = [bench.submit(4, max_tokens=3) for _ in range(3)]
    with pytest.raises(QueueFullError, match="max_num_queued_reqs is 1"):
        bench.submit(4)
    bench.step()
    with pytest.raises(QueueFullError):
        bench.submit(4)
    bench.scheduler.abort(first[2])
    bench.submit(4)


def test_the_queue_refuses_more_prompt_tokens_than_may_wait_but_never_a_lone_prompt() -> None:
    bench = Bench(queued_tokens=10)
    bench.submit(12)
    with pytest.raises(QueueFullError, match="max_num_queued_tokens is 10"):
        bench.submit(1)
    bench.step()
    bench.submit(4)
    bench.submit(6)
    with pytest.raises(QueueFullError):
        bench.submit(1)


def test_a_policy_that_raises_leaves_nothing_behind() -> None:
    class Broken(SchedulingPolicy):
        def key(self, request: ScheduledRequest) -> int:
            raise KeyError(request.request_id)

    bench = Bench(policy=Broken())
    with pytest.raises(RequestError, match=r"scheduling policy 'fcfs' failed on this request \(KeyError"):
        bench.submit(4)
    bench.scheduler.check()
    assert not bench.scheduler.has_work


@pytest.mark.parametrize("odd", [None, "text", float("nan"), (1,), object()])
def test_a_key_that_cannot_be_ordered_refuses_its_request_alone(odd: object) -> None:
    class OddFirst(SchedulingPolicy):
        def key(self, request: ScheduledRequest) -> object:
            return odd if len(request.prompt_token_ids) == 7 else len(request.prompt_token_ids)

    bench = Bench(policy=OddFirst())
    bench.submit(4)
    for _ in range(2):
        with pytest.raises(
            RequestError, match=r"scheduling policy 'fcfs' gave this request the key .* ordered"
        ):
            bench.submit(7)
        bench.submit(3)
    bench.scheduler.check()
    assert bench.scheduler.num_waiting == 3


def test_keys_of_one_odd_type_are_compared_with_every_other() -> None:
    class Pairs(SchedulingPolicy):
        def key(self, request: ScheduledRequest) -> object:
            count = len(request.prompt_token_ids)
            return (count % 2, "even" if count == 6 else count)

    bench = Bench(policy=Pairs())
    for count in (5, 4):
        bench.submit(count)
    with pytest.raises(RequestError, match="cannot be ordered with"):
        bench.submit(6)
    bench.submit(3)
    bench.scheduler.check()


@pytest.mark.parametrize("limits", [(0, 1, 10), (1, 0, 10), (1, 1, 1)])
def test_limits_out_of_range_are_refused(limits: tuple[int, int, int]) -> None:
    with pytest.raises(ConfigError):
        SchedulerConfig(*limits)
