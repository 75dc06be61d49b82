"""engine.metrics(): what is counted is exact, whatever happens to a request."""

from __future__ import annotations

import asyncio
import math
import pickle
from pathlib import Path

import pytest
from engine_state import MakeEngine

from kvpage import AsyncEngine, Engine, EngineDeadError, RequestError, SamplingParams
from kvpage.metrics import HistogramValue, MetricsSnapshot

TEN = SamplingParams(temperature=0.0, max_tokens=10, ignore_eos=True)
PROMPTS = [list(range(10, 20 + 3 * i)) for i in range(10)]
PROMPT_TOKENS = sum(map(len, PROMPTS))
LATENCIES = (
    "e2e_request_latency_seconds",
    "request_queue_time_seconds",
    "request_prefill_time_seconds",
    "request_decode_time_seconds",
    "request_inference_time_seconds",
    "request_time_per_output_token_seconds",
)


def gauges(snapshot: MetricsSnapshot) -> tuple[float, float, float]:
    names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
    running, waiting, usage = map(snapshot.value, names)
    return running, waiting, usage


def test_ten_requests_of_ten_tokens_are_counted_exactly(make_engine: MakeEngine) -> None:
    engine = make_engine(enable_prefix_caching=False)
    engine.generate(PROMPTS, TEN)
    found = engine.metrics()
    assert found.histogram("time_to_first_token_seconds").count == 10
    assert found.histogram("inter_token_latency_seconds").count == 10 * (10 - 1)
    assert found.value("prompt_tokens") == PROMPT_TOKENS
    assert found.value("generation_tokens") == 100
    assert found.value("request_success", finished_reason="length") == 10
    assert found.histogram("iteration_tokens_total").sum == PROMPT_TOKENS + 100
    assert found.histogram("iteration_tokens_total").count == engine.stats().steps
    for name in LATENCIES:
        assert found.histogram(name).count == 10, name
    assert found.histogram("request_prompt_tokens").sum == PROMPT_TOKENS
    assert found.histogram("request_generation_tokens").sum == 100
    assert found.histogram("request_params_max_tokens").sum == 100
    assert found.histogram("request_params_n").sum == 10
    assert found.histogram("request_prefill_kv_computed_tokens").sum == PROMPT_TOKENS
    assert gauges(found) == (0, 0, 0)


def test_latencies_add_up(make_engine: MakeEngine) -> None:
    engine = make_engine()
    output = engine.generate([PROMPTS[0]], TEN)[0]
    found, metrics = engine.metrics(), output.metrics
    assert metrics.queued is not None
    assert metrics.prefill is not None
    assert metrics.decode is not None
    assert found.histogram("request_queue_time_seconds").sum == metrics.queued
    assert found.histogram("inter_token_latency_seconds").sum == pytest.approx(metrics.decode)
    assert found.histogram("request_time_per_output_token_seconds").sum == pytest.approx(metrics.decode / 9)
    first = found.histogram("time_to_first_token_seconds").sum
    assert first == pytest.approx(metrics.queued + metrics.prefill)
    assert found.histogram("e2e_request_latency_seconds").sum >= first + metrics.decode
    phases = [found.histogram("step_seconds", phase=p) for p in ("schedule", "execute", "commit", "deliver")]
    assert {phase.count for phase in phases} == {10}
    in_scheduler = found.histogram("scheduler_step_seconds").sum
    assert in_scheduler == pytest.approx(phases[0].sum + phases[2].sum)


def test_gauges_show_what_runs_and_return_to_zero_after_an_abort(make_engine: MakeEngine) -> None:
    engine = make_engine(max_num_seqs=2, num_kv_blocks=40, block_size=16)
    handles = [engine.submit(prompt, TEN) for prompt in PROMPTS[:3]]
    engine.step()
    found = engine.metrics()
    running, waiting, usage = gauges(found)
    assert (running, waiting) == (2, 1)
    assert usage == found.value("kv_blocks", state="used") / 40 > 0
    assert found.value("num_requests_waiting_by_reason", reason="capacity") == 1
    for handle in handles:
        handle.cancel()
    found = engine.metrics()
    assert gauges(found) == (0, 0, 0)
    assert found.value("request_success", finished_reason="abort") == 3
    assert found.histogram("request_queue_time_seconds").count == 2
    assert found.value("prompt_tokens") == len(PROMPTS[0]) + len(PROMPTS[1])


def test_block_states_add_up_to_the_pool(make_engine: MakeEngine) -> None:
    engine = make_engine(num_kv_blocks=40, block_size=4)
    prompt = list(range(10, 22))
    handles = [engine.submit(prompt, TEN.clone(max_tokens=3)) for _ in range(2)]
    engine.step()
    states = {s.labels["state"]: s.value for s in engine.metrics()["kv_blocks"].samples}
    # Two of three blocks are a prefix hit; the last token of a prompt is always computed.
    assert states == {"shared": 2, "used": 2, "cached": 0, "free": 36}
    for handle in handles:
        handle.result()
    states = {s.labels["state"]: s.value for s in engine.metrics()["kv_blocks"].samples}
    assert (states["shared"], states["used"]) == (0, 0)
    assert states["cached"] == engine.stats().cached_blocks > 0
    assert sum(float(v) for v in states.values() if not isinstance(v, HistogramValue)) == 40


def test_prefix_hits_are_counted_in_tokens(make_engine: MakeEngine) -> None:
    engine = make_engine(block_size=16)
    for _ in range(2):
        engine.generate([list(range(10, 50))], TEN)
    found = engine.metrics()
    assert (found.value("prefix_cache_queries"), found.value("prefix_cache_hits")) == (80, 32)
    assert (found.value("prompt_tokens"), found.value("prompt_tokens_cached")) == (80, 32)
    assert found.value("prompt_tokens_by_source", source="local_compute") == 48
    assert found.value("prompt_tokens_by_source", source="local_cache_hit") == 32
    assert found.histogram("request_prefill_kv_computed_tokens").sum == 48


def test_choices_are_counted_as_tokens_of_one_request(make_engine: MakeEngine) -> None:
    engine = make_engine(block_size=16)
    engine.generate([PROMPTS[0]], TEN.clone(n=3, temperature=1.0, seed=1))
    found = engine.metrics()
    assert found.histogram("time_to_first_token_seconds").count == 1
    assert found.histogram("inter_token_latency_seconds").count == 3 * 9
    assert found.value("request_success", finished_reason="length") == 1
    assert (found.value("prompt_tokens"), found.value("generation_tokens")) == (10, 30)
    assert found.histogram("iteration_tokens_total").sum == 40
    assert found.histogram("request_max_num_generation_tokens").sum == 10
    assert found.histogram("request_params_n").sum == 3
    assert (found.value("kv_forks"), found.value("kv_block_copies")) == (2, 2)


def test_preemptions_change_no_count_of_tokens(make_engine: MakeEngine) -> None:
    engine = make_engine(num_kv_blocks=9, block_size=4, max_num_seqs=4, max_model_len=32)
    engine.generate([list(range(10 + i, 18 + i)) for i in range(4)], TEN)
    found = engine.metrics()
    assert found.value("num_preemptions") == engine.stats().preemptions > 0
    assert found.histogram("request_num_preemptions").sum == engine.stats().preemptions
    assert (found.value("prompt_tokens"), found.value("generation_tokens")) == (32, 40)
    assert found.histogram("inter_token_latency_seconds").count == 36


def test_refusals_are_counted_by_reason(make_engine: MakeEngine) -> None:
    engine = make_engine(max_num_seqs=1, max_num_queued_reqs=1, max_model_len=64)
    first = engine.submit([5, 6], TEN, request_id="one")
    second = engine.submit([5, 6], TEN)
    refused = [([5], None), ([5] * 64, None), ([5], "one")]
    for prompt, request_id in refused:
        with pytest.raises(RequestError):
            engine.submit(prompt, TEN, request_id=request_id)
    found = engine.metrics()
    for reason in ("queue_full", "too_long", "invalid"):
        assert found.value("admission_rejections", reason=reason) == 1, reason
    first.result()
    second.result()
    assert engine.metrics().histogram("request_prompt_tokens").count == 2


def test_an_embedding_has_a_prompt_and_no_tokens(make_engine: MakeEngine) -> None:
    engine = make_engine()
    engine.embed(PROMPTS)
    found = engine.metrics()
    assert (found.value("prompt_tokens"), found.value("generation_tokens")) == (PROMPT_TOKENS, 0)
    assert found.value("request_success", finished_reason="stop") == 10
    assert found.histogram("e2e_request_latency_seconds").count == 10
    assert found.histogram("request_prefill_time_seconds").count == 10
    for name in ("time_to_first_token_seconds", "request_generation_tokens", "request_decode_time_seconds"):
        assert found.histogram(name).count == 0, name


def test_a_snapshot_is_plain_data_that_stays_as_it_is(make_engine: MakeEngine) -> None:
    engine = make_engine()
    before = engine.metrics()
    engine.generate([PROMPTS[0]], TEN)
    after = engine.metrics()
    assert before.value("generation_tokens") == 0
    assert pickle.loads(pickle.dumps(after)) == after
    assert [family.name for family in before] == [family.name for family in after]
    for family in after:
        assert family.help
        assert all(tuple(sample.labels) == family.label_names for sample in family.samples)
        for value in (sample.value for sample in family.samples):
            assert isinstance(value, HistogramValue) == (family.kind == "histogram")
            if isinstance(value, HistogramValue):
                assert value.buckets[-1] == (math.inf, value.count)
    with pytest.raises(KeyError):
        after.value("generation_tokens", engine="x")
    with pytest.raises(KeyError):
        after["no_such_metric"]


def test_buckets_are_those_of_the_contract(make_engine: MakeEngine) -> None:
    found = make_engine(max_model_len=300).metrics()
    assert list(found.histogram("request_prompt_tokens").bounds) == [1, 2, 5, 10, 20, 50, 100, 200]
    assert found.histogram("time_to_first_token_seconds").bounds[-3:] == (160.0, 640.0, 2560.0)
    assert found.histogram("inter_token_latency_seconds").bounds[:3] == (0.01, 0.025, 0.05)
    assert found.histogram("request_queue_time_seconds").bounds[-1] == 7680.0
    assert found.histogram("iteration_tokens_total").bounds[-1] == 16384


def test_a_bound_belongs_to_the_bucket_it_ends(make_engine: MakeEngine) -> None:
    engine = make_engine()
    engine.generate([[5] * 10], TEN)
    found = engine.metrics().histogram("request_generation_tokens")
    assert dict(found.buckets)[5] == 0
    assert dict(found.buckets)[10] == 1


def test_engines_count_apart_and_say_what_their_cache_is(make_engine: MakeEngine) -> None:
    one, other = make_engine(num_kv_blocks=32, block_size=16), make_engine()
    one.generate([PROMPTS[0]], TEN)
    assert other.metrics().value("generation_tokens") == 0
    labels = one.metrics()["cache_config_info"].samples[0].labels
    assert (labels["num_gpu_blocks"], labels["block_size"], labels["kv_cache_size_tokens"]) == (
        "32",
        "16",
        "512",
    )


def test_a_failed_step_ends_requests_in_error_and_the_counts_stay(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(tiny)
    handle = engine.submit(PROMPTS[0], TEN)
    engine.step()
    monkeypatch.setattr(engine._core.scheduler, "schedule", lambda: 1 / 0)
    with pytest.raises(EngineDeadError):
        handle.result()
    engine.close()
    found = engine.metrics()
    assert found.value("request_success", finished_reason="error") == 1
    assert found.value("generation_tokens") == 1


def test_an_async_engine_tells_the_same_also_after_its_end(tiny: Path) -> None:
    engine = AsyncEngine(tiny)

    async def main() -> None:
        await asyncio.gather(*(engine.generate(prompt, TEN) for prompt in PROMPTS))
        running = engine.generate(PROMPTS[0], TEN.clone(max_tokens=400))
        assert engine.metrics().value("generation_tokens") >= 100
        running.cancel()
        await running

    asyncio.run(main())
    found = engine.metrics()
    assert gauges(found) == (0, 0, 0)
    assert found.value("request_success", finished_reason="length") == 10
    assert found.value("request_success", finished_reason="abort") == 1
    engine.close()
    assert engine.metrics().value("request_success", finished_reason="length") == 10
