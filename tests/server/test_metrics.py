"""GET /metrics: vLLM's names and types, exact counts, and what HTTP did; and the log of requests."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families
from served_model import KEY, MODEL, ServedModel, serving

from kvpage.metrics import MetricsSnapshot
from kvpage_server.exposition import prefixes
from kvpage_server.http_counts import HttpCounts

CONTRACT = {
    "num_requests_running": "gauge", "num_requests_waiting": "gauge", "num_requests_waiting_by_reason": "gauge",
    "kv_cache_usage_perc": "gauge", "cache_config_info": "gauge", "prefix_cache_queries": "counter",
    "prefix_cache_hits": "counter", "num_preemptions": "counter", "prompt_tokens": "counter",
    "generation_tokens": "counter", "prompt_tokens_cached": "counter", "prompt_tokens_by_source": "counter",
    "request_success": "counter", "admission_rejections": "counter", "time_to_first_token_seconds": "histogram",
    "inter_token_latency_seconds": "histogram", "request_time_per_output_token_seconds": "histogram",
    "e2e_request_latency_seconds": "histogram", "request_queue_time_seconds": "histogram",
    "request_inference_time_seconds": "histogram", "request_prefill_time_seconds": "histogram",
    "request_decode_time_seconds": "histogram", "request_prompt_tokens": "histogram",
    "request_generation_tokens": "histogram", "request_max_num_generation_tokens": "histogram",
    "request_params_n": "histogram", "request_params_max_tokens": "histogram", "iteration_tokens_total": "histogram",
    "request_num_preemptions": "histogram", "request_prefill_kv_computed_tokens": "histogram",
}  # fmt: skip
FIRST_TOKEN_BOUNDS = [
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0,
    640.0, 2560.0,
]  # fmt: skip


@pytest.fixture(scope="module")
def shared(tiny: Path) -> Iterator[ServedModel]:
    """A server whose counts no test relies on."""
    with serving(tiny, metrics_prefix="both") as running:
        yield running


class Scrape:
    """What one GET /metrics said."""

    def __init__(self, server: ServedModel, prefix: str = "kvpage:") -> None:
        answer = server.http.get("/metrics")
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/plain; version=")
        self.families = {family.name: family for family in text_string_to_metric_families(answer.text)}
        self.samples = [sample for family in self.families.values() for sample in family.samples]
        self.prefix = prefix

    def value(self, name: str, **labels: str) -> float:
        """The sum over all samples of that name with these labels."""
        found = [
            s.value
            for s in self.samples
            if s.name in (name, self.prefix + name) and labels.items() <= s.labels.items()
        ]
        assert found, name
        return sum(found)


def test_ten_requests_of_ten_tokens_are_counted_exactly(tiny: Path) -> None:
    with serving(tiny, metrics_prefix="vllm:") as server:
        prompt_tokens = 0
        for number in range(10):
            answer = server.client.completions.create(
                model=MODEL, prompt=f"number {number}", max_tokens=10, extra_body={"ignore_eos": True}
            )
            assert answer.usage is not None
            prompt_tokens += answer.usage.prompt_tokens
        scrape = Scrape(server, "vllm:")
        assert scrape.value("time_to_first_token_seconds_count") == 10
        assert scrape.value("inter_token_latency_seconds_count") == 10 * 9
        assert scrape.value("e2e_request_latency_seconds_count") == 10
        assert (
            scrape.value("prompt_tokens_total") == scrape.value("request_prompt_tokens_sum") == prompt_tokens
        )
        assert scrape.value("generation_tokens_total") == scrape.value("request_generation_tokens_sum") == 100
        assert scrape.value("request_success_total") == 10
        assert scrape.value("request_success_total", finished_reason="length") == 10
        assert scrape.value("iteration_tokens_total_sum") == prompt_tokens + 100
        assert (
            scrape.value("http_requests_total", handler="/v1/completions", status="2xx", method="POST") == 10
        )
        assert scrape.value("http_request_duration_seconds_count", handler="/v1/completions") == 10
        for sample in scrape.samples:
            if sample.name.startswith("vllm:"):
                assert (sample.labels["model_name"], sample.labels["engine"]) == (MODEL, "0")


def test_gauges_return_to_nothing_when_a_stream_is_left(shared: ServedModel) -> None:
    stream = shared.client.completions.create(
        model=MODEL, prompt="go", max_tokens=400, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    stream.close()
    for _ in range(500):
        scrape = Scrape(shared)
        if not scrape.value("num_requests_running"):
            break
    assert scrape.value("num_requests_running") == 0
    assert scrape.value("kv_cache_usage_perc") == 0
    assert scrape.value("request_success_total", finished_reason="abort") >= 1


def test_names_and_types_are_the_contracts_under_each_prefix(shared: ServedModel) -> None:
    families = Scrape(shared).families
    for prefix in ("kvpage:", "vllm:"):
        for name, kind in CONTRACT.items():
            assert families[prefix + name].type == kind, name
    for name in ("http_requests", "process_cpu_seconds", "python_info", "python_gc_collections"):
        assert name in families


def test_buckets_are_the_contracts(shared: ServedModel) -> None:
    buckets = [
        float(sample.labels["le"])
        for sample in Scrape(shared).samples
        if sample.name == "vllm:time_to_first_token_seconds_bucket"
    ]
    assert buckets == [*FIRST_TOKEN_BOUNDS, float("inf")]


def test_names_keep_their_colons_whatever_format_a_scraper_prefers(shared: ServedModel) -> None:
    accept = "application/openmetrics-text;version=1.0.0;q=0.5,text/plain;version=0.0.4;q=0.3"
    answer = shared.http.get("/metrics", headers={"accept": accept})
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert "\nkvpage:num_requests_running{" in answer.text


def test_metrics_need_no_key(tiny: Path) -> None:
    with serving(tiny, api_keys=(KEY,)) as server:
        assert server.http.get("/metrics", headers={"authorization": "Bearer wrong"}).status_code == 200


def test_paths_that_clients_make_up_are_one_handler(shared: ServedModel) -> None:
    for path in ("/nowhere", "/v1/nothing", "/v1/models/some/model"):
        shared.http.get(path)
    shared.http.request("PROPFIND", "/v1/models")
    scrape = Scrape(shared)
    assert scrape.value("http_requests_total", handler="none", status="4xx") >= 2
    assert scrape.value("http_requests_total", handler="/v1/models/{model_id:path}") >= 1
    assert scrape.value("http_requests_total", method="OTHER") == 1
    handlers = {sample.labels["handler"] for sample in scrape.samples if "handler" in sample.labels}
    assert not handlers & {"/nowhere", "/v1/nothing", "/v1/models/some/model"}


def test_a_request_given_up_before_its_answer_counts_as_a_clients_error() -> None:
    counts = HttpCounts()
    counts.observe("POST", None, "/v1/completions", 1.0)
    (sample,) = counts.families()[0].samples
    assert (sample.labels["status"], sample.value) == ("4xx", 1)


def test_a_scrape_does_not_wait_for_a_long_step(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvpage_server.routes.metrics.PATIENCE", 0.05)
    with serving(tiny) as server:
        before = Scrape(server)
        engine, may_go_on = server.service.engine, threading.Event()
        whole = type(engine).metrics

        def slow(self: object) -> MetricsSnapshot:
            may_go_on.wait(timeout=30.0)
            return whole(engine)

        monkeypatch.setattr(type(engine), "metrics", slow)
        server.client.completions.create(model=MODEL, prompt="a", max_tokens=1)
        during = [Scrape(server) for _ in range(3)]
        may_go_on.set()
        assert {scrape.value("generation_tokens_total") for scrape in during} == {
            before.value("generation_tokens_total")
        }
        for _ in range(500):
            after = Scrape(server).value("generation_tokens_total")
            if after:
                break
        assert after == 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("kvpage:", ("kvpage:",)),
        ("vllm", ("vllm:",)),
        ("both", ("kvpage:", "vllm:")),
        ("vllm:, kvpage:,vllm", ("vllm:", "kvpage:")),
        ("", ("",)),
    ],
)
def test_prefixes_are_read_with_and_without_their_colon(text: str, expected: tuple[str, ...]) -> None:
    assert prefixes(text) == expected


def test_the_request_log_has_one_json_line_a_request_with_its_ids(
    tiny: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="kvpage.server.requests")
    with serving(tiny, log_requests=True, max_log_len=3) as server:
        body = {"prompt": ["one two", "three\nfour"], "max_tokens": 2, "ignore_eos": True}
        server.http.post("/v1/completions", json=body, headers={"x-request-id": "mine"})
        server.http.get("/health")
        server.refusal("/v1/completions", prompt="")
    first, second = [json.loads(r.message) for r in caplog.records if r.name == "kvpage.server.requests"]
    assert (first["request_id"], first["method"], first["path"], first["status"]) == (
        "mine", "POST", "/v1/completions", 200,
    )  # fmt: skip
    assert first["seconds"] > 0
    assert [entry["prompt"] for entry in first["engine_requests"]] == ["one", "thr"]
    for entry in first["engine_requests"]:
        assert entry["id"].startswith("cmpl-mine-")
        assert entry["completion_tokens"] == 2
        assert entry["finish_reasons"] == ["length"]
    assert second["status"] == 400
    assert "engine_requests" not in second


def test_prompts_stay_out_of_the_log_unless_it_is_told_how_much_to_show(
    tiny: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="kvpage.server.requests")
    with serving(tiny, log_requests=True) as server:
        server.post("/v1/embeddings", input="a secret")
    (record,) = [r for r in caplog.records if r.name == "kvpage.server.requests"]
    assert "secret" not in record.message
    assert json.loads(record.message)["engine_requests"][0]["finish_reasons"] == ["stop"]


def test_nothing_is_logged_unless_it_is_asked_for(
    shared: ServedModel, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="kvpage.server.requests")
    shared.post("/v1/embeddings", input="a")
    assert not [r for r in caplog.records if r.name == "kvpage.server.requests"]
