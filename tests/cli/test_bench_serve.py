"""``kvpage bench serve``: what it sends, what it counts, and vLLM's keys in what it writes."""

from __future__ import annotations

import json
import math
import random
import statistics
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from stub_server import MODEL, Stub, serving

from kvpage.cli.main import main
from kvpage.cli.remote import EventReader
from kvpage.cli.serve_datasets import Words, make_samples
from kvpage.cli.serve_flags import read_flags
from kvpage.cli.serve_load import Answer, Arrivals
from kvpage.cli.serve_metrics import result_of, series_of, spread_of
from kvpage.flags.parser import UsageError
from kvpage.text.tokenizer import Tokenizer, load_tokenizer

VLLM_KEYS = {
    "date", "endpoint_type", "backend", "label", "model_id", "tokenizer_id", "num_prompts", "request_rate",
    "burstiness", "max_concurrency", "duration", "completed", "failed", "total_input_tokens", "total_output_tokens",
    "request_throughput", "request_goodput", "output_throughput", "total_token_throughput",
    "max_output_tokens_per_s", "max_concurrent_requests",
    *(f"{kind}_{name}_ms" for kind in ("mean", "median", "std", "p99") for name in ("ttft", "tpot", "itl")),
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer(checkpoint: str) -> Tokenizer:
    return load_tokenizer(checkpoint)


def bench(stub: Stub, *arguments: str) -> int:
    return main(["bench", "serve", "--port", str(stub.port), "--skip-tokenizer-init", *arguments])


def result(stub: Stub, capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    status = bench(stub, "--json", "--num-prompts", "3", "--random-input-len", "5", *arguments)
    captured = capsys.readouterr()
    assert (status, captured.err) == (0, "")
    return dict(json.loads(captured.out))


def test_the_result_has_the_keys_of_vllm(capsys: pytest.CaptureFixture[str]) -> None:
    with serving() as stub:
        found = result(stub, capsys)
    assert set(found) - {"environment", "latencies", "queue_times"} == VLLM_KEYS
    assert (found["completed"], found["failed"], found["model_id"]) == (3, 0, MODEL)
    assert (found["total_input_tokens"], found["total_output_tokens"]) == (21, 9)


def test_a_request_is_the_one_that_vllm_sends(capsys: pytest.CaptureFixture[str]) -> None:
    with serving() as stub:
        result(stub, capsys, "--random-output-len", "4", "--request-id-prefix", "run-", "--header", "x-a=b=c")
    path, headers, body = stub.seen[0]
    assert path == "/v1/completions"
    assert len(body.pop("prompt").split()) == 5
    assert body == {
        "model": MODEL, "max_tokens": 4, "repetition_penalty": 1.0, "logprobs": None, "stream": True,
        "stream_options": {"include_usage": True}, "ignore_eos": True,
    }  # fmt: skip
    assert headers["x-a"] == "b=c"
    assert sorted(headers["x-request-id"] for _, headers, _ in stub.seen) == ["run-0", "run-1", "run-2"]


def test_chats_are_asked_as_chats(capsys: pytest.CaptureFixture[str]) -> None:
    with serving() as stub:
        found = result(
            stub, capsys, "--backend", "openai-chat", "--temperature", "0", "--extra-body", '{"top_k": 3}'
        )
    path, _, body = stub.seen[0]
    assert path == "/v1/chat/completions"
    assert (body["messages"][0]["role"], body["max_completion_tokens"]) == ("user", 128)
    assert (body["temperature"], body["top_k"]) == (0, 3)
    assert found["total_output_tokens"] == 9


def test_a_key_in_the_environment_is_sent(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    with serving() as stub:
        result(stub, capsys)
    assert stub.seen[0][1]["authorization"] == "Bearer secret"


def test_no_more_requests_run_at_once_than_allowed(capsys: pytest.CaptureFixture[str]) -> None:
    with serving() as stub:
        result(stub, capsys, "--max-concurrency", "1", "--num-prompts", "6", "--num-warmups", "2",
               "--percentile-metrics", "client_queue_time")  # fmt: skip
    assert (len(stub.seen), stub.most) == (8, 1)


def test_warm_ups_are_not_counted(capsys: pytest.CaptureFixture[str]) -> None:
    with serving() as stub:
        found = result(stub, capsys, "--num-warmups", "2", "--max-concurrency", "2")
    assert (len(stub.seen), found["completed"]) == (5, 3)


def test_requests_that_are_refused_are_counted_and_named(capsys: pytest.CaptureFixture[str]) -> None:
    with serving(refuse=(400, "too long"), refusals=1) as stub:
        status = bench(stub, "--json", "--num-prompts", "3", "--save-detailed")
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert (status, found["completed"], found["failed"]) == (0, 2, 1)
    assert [error for error in found["errors"] if error] == ["HTTP 400: too long"]
    assert captured.err == "failed: HTTP 400: too long\n"


def test_a_stream_that_ends_in_an_error_has_failed(capsys: pytest.CaptureFixture[str]) -> None:
    with serving(break_after=1) as stub:
        status = bench(stub, "--json", "--num-prompts", "1")
    captured = capsys.readouterr()
    assert (status, json.loads(captured.out)["failed"]) == (2, 1)
    assert "the step failed" in captured.err


def test_without_usage_tokens_are_counted_from_the_text(capsys: pytest.CaptureFixture[str]) -> None:
    with serving(usage=False) as stub:
        found = result(stub, capsys)
    assert (found["total_input_tokens"], found["total_output_tokens"]) == (15, 9)


def test_the_printed_lines_are_those_of_vllm(capsys: pytest.CaptureFixture[str]) -> None:
    with serving() as stub:
        assert (
            bench(stub, "--num-prompts", "2", "--goodput", "ttft:60000", "--metric-percentiles", "50,99.9")
            == 0
        )
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "============ Serving Benchmark Result ============"
    assert "Successful requests:                     2         " in lines
    begins = [line.partition(":")[0] for line in lines]
    assert "Request goodput (req/s)" in begins
    assert "P99.9 TTFT (ms)" in begins
    assert "---------------Time to First Token----------------" in lines


def test_results_are_saved_and_appended(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = ("--num-prompts", "1", "--result-dir", str(tmp_path / "new"), "--metadata", "commit=abc")
    with serving() as stub:
        assert bench(stub, *where, "--save-result") == 0
        (named,) = (tmp_path / "new").iterdir()
        for _ in range(2):
            assert bench(stub, *where, "--append-result", "--result-filename", "all.json") == 0
    assert named.name.startswith(f"openai-infqps-{MODEL}-")
    saved = json.loads(named.read_text(encoding="utf-8"))
    assert saved["commit"] == "abc"
    assert "ttfts" not in saved
    lines = (tmp_path / "new" / "all.json").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["completed"] for line in lines] == [1, 1]


def test_the_ready_check_waits_for_an_answer(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def at_once(seconds: float) -> None:
        assert 0 < seconds <= 1

    monkeypatch.setattr("kvpage.cli.serve_load.asyncio.sleep", at_once)
    with serving(refuse=(503, "loading"), refusals=2) as stub:
        found = result(stub, capsys, "--ready-check-timeout-sec", "60")
    assert (len(stub.seen), found["completed"]) == (6, 3)


def test_a_server_that_is_not_there_is_said_so(capsys: pytest.CaptureFixture[str]) -> None:
    with serving() as stub:
        pass
    assert bench(stub, "--num-prompts", "1") == 2
    assert "is the server up?" in capsys.readouterr().err


def test_without_httpx_the_way_to_it_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "httpx", None)
    assert main(["bench", "serve"]) == 2
    assert "pip install 'kvpage[server]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--dataset-name", "sonnet"], "the poem comes with vLLM's sources"),
        (["--dataset-name", "sharegpt"], "--dataset-path FILE"),
        (["--dataset-path", "x.json"], "makes its prompts and reads no file"),
        (["--goodput", "itl:5"], "ttft, tpot, e2el"),
        (["--goodput", "ttft"], "METRIC:MILLISECONDS"),
        (["--percentile-metrics", "tbt"], "name some of ttft"),
        (["--metric-percentiles", "101"], "list of percentiles"),
        (["--request-rate", "0"], "must be above 0"),
        (["--ramp-up-strategy", "linear"], "--ramp-up-start-rps"),
        (["--ramp-up-strategy", "linear", "--request-rate", "3"], "leave --request-rate out"),
        (["--backend", "openai-chat", "--endpoint", "/v1/completions"], "take the other backend"),
        (["--use-beam-search"], "beam search has not landed"),
        (["--max-concurrency", "0"], "at least 1"),
        (["--base-url", "ftp://x"], "http:// or https://"),
        (["--header", "novalue"], "KEY=VALUE"),
    ],
)
def test_flags_that_make_no_sense_are_refused_before_anything_is_sent(
    arguments: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving() as stub:
        assert bench(stub, *arguments) == 2
    assert reason in capsys.readouterr().err
    assert stub.seen == []


def test_evenly_spaced_requests_are_evenly_spaced() -> None:
    times = Arrivals(rate=4.0, burstiness=math.inf).times(4, random.Random(0))
    assert times == pytest.approx([0.25, 0.5, 0.75, 1.0])


def test_the_mean_rate_is_exactly_the_one_asked_for() -> None:
    for burstiness in (0.2, 1.0, 5.0):
        times = Arrivals(rate=10.0, burstiness=burstiness).times(200, random.Random(1))
        assert times == sorted(times)
        assert times[-1] == pytest.approx(20.0)


def test_less_burstiness_means_evener_gaps() -> None:
    def spread(burstiness: float) -> float:
        times = Arrivals(rate=1.0, burstiness=burstiness).times(2000, random.Random(2))
        return statistics.stdev(later - sooner for sooner, later in pairwise(times))

    assert spread(0.25) > 1.6 > spread(1.0) > 0.8 > spread(16.0)


def test_the_rate_ramps_up() -> None:
    linear = Arrivals(ramp_up="linear", start_rps=1.0, end_rps=9.0)
    exponential = Arrivals(ramp_up="exponential", start_rps=1.0, end_rps=9.0)
    assert [linear.rate_at(index, 3) for index in range(3)] == pytest.approx([1.0, 5.0, 9.0])
    assert [exponential.rate_at(index, 3) for index in range(3)] == pytest.approx([1.0, 3.0, 9.0])


def test_all_requests_at_once_wait_for_nothing() -> None:
    assert Arrivals().times(3, random.Random(0)) == [0.0, 0.0, 0.0]


def answered(start: float, ttft: float, itl: list[float]) -> Answer:
    return Answer(prompt_len=10, success=True, output_tokens=1 + len(itl), start_time=start, ttft=ttft, itl=itl,
                  latency=ttft + sum(itl))  # fmt: skip


def test_times_are_told_in_milliseconds_over_successful_requests() -> None:
    answers = [answered(0.0, 0.1, [0.2, 0.4]), answered(0.5, 0.3, []), Answer(prompt_len=10, error="no")]
    found = result_of(answers, 2.0, count=None, goodput={"ttft": 200.0, "tpot": 301.0})
    assert (found["completed"], found["failed"], found["total_output_tokens"]) == (2, 1, 4)
    assert found["request_goodput"] == 0.5  # the second is too late
    assert (found["max_output_tokens_per_s"], found["max_concurrent_requests"]) == (4.0, 2)
    spread = spread_of(
        series_of(answers, found["output_lens"]), ["ttft", "tpot", "itl", "e2el"], [50.0, 99.0]
    )
    assert spread["mean_ttft_ms"] == pytest.approx(200.0)
    assert spread["p50_itl_ms"] == pytest.approx(300.0)
    assert spread["mean_tpot_ms"] == pytest.approx(300.0)  # one answer has more than one token
    assert spread["median_e2el_ms"] == pytest.approx(500.0)


def test_events_are_read_however_they_are_cut() -> None:
    stream = ': ping\n\ndata: {"a": "é"}\r\n\r\ndata: one\ndata: two\n\n'.encode()
    whole = list(EventReader().push(stream))
    reader = EventReader()
    cut = [data for index in range(len(stream)) for data in reader.push(stream[index : index + 1])]
    assert whole == cut == ['{"a": "é"}', "one\ntwo"]


def samples(tokenizer: Any, *arguments: str) -> list[Any]:
    return make_samples(read_flags(arguments, ""), tokenizer, lambda text: f"<{text}>")


def test_random_prompts_have_their_length_and_repeat_with_the_seed(tokenizer: Tokenizer) -> None:
    flags = ("--num-prompts", "4", "--random-input-len", "40", "--random-prefix-len", "8")
    made = samples(tokenizer, *flags)
    assert [sample.prompt_len for sample in made] == [48] * 4
    assert [len(tokenizer.encode(sample.prompt, add_special_tokens=False)) for sample in made] == [48] * 4
    assert len({sample.prompt for sample in made}) == 4
    assert made == samples(tokenizer, *flags)
    assert made != samples(tokenizer, *flags, "--seed", "1")


def test_random_lengths_vary_around_the_middle(tokenizer: Tokenizer) -> None:
    made = samples(tokenizer, "--num-prompts", "50", "--input-len", "20", "--output-len", "10",
                   "--random-range-ratio", "0.5")  # fmt: skip
    assert {sample.output_len for sample in made} == set(range(5, 16))
    assert all(10 <= sample.prompt_len <= 30 for sample in made)


def test_prefixes_are_repeated() -> None:
    made = samples(Words(), "--dataset-name", "prefix_repetition", "--num-prompts", "12",
                   "--prefix-repetition-num-prefixes", "3", "--prefix-repetition-prefix-len", "20")  # fmt: skip
    assert len(made) == 12
    assert len({tuple(sample.prompt.split()[:20]) for sample in made}) == 3
    assert {len(sample.prompt.split()) for sample in made} == {276}


def test_sharegpt_takes_first_turns_and_fills_up(tmp_path: Path) -> None:
    turns = [
        ("a b c d e", "one two three four"),
        ("too short", "x"),
        ("f g h i", "five six seven eight nine"),
    ]
    data = [{"conversations": [{"value": question}, {"value": answer}]} for question, answer in turns]
    path = tmp_path / "share.json"
    path.write_text(json.dumps([*data, {"conversations": [{"value": "alone"}]}]), encoding="utf-8")
    flags = (
        "--dataset-name",
        "sharegpt",
        "--dataset-path",
        str(path),
        "--num-prompts",
        "5",
        "--disable-shuffle",
    )
    made = samples(Words(), *flags)
    assert [(sample.prompt, sample.output_len) for sample in made[:2]] == [("a b c d e", 4), ("f g h i", 5)]
    assert len(made) == 5
    assert len(samples(Words(), *flags, "--no-oversample")) == 2


def test_custom_prompts_go_through_the_template_and_bring_their_length(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(
        '{"prompt": "hi", "output_tokens": 9}\n{"prompt": "ho", "output_tokens": 3}\n', encoding="utf-8"
    )
    flags = (
        "--dataset-name",
        "custom",
        "--dataset-path",
        str(path),
        "--num-prompts",
        "2",
        "--disable-shuffle",
    )
    assert [(made.prompt, made.output_len) for made in samples(Words(), *flags)] == [
        ("<hi>", 256),
        ("<ho>", 256),
    ]
    own = samples(Words(), *flags, "--custom-output-len", "-1", "--skip-chat-template")
    assert [(made.prompt, made.output_len) for made in own] == [("hi", 9), ("ho", 3)]


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [("custom", '{"prompt": 3}', "line 1"), ("custom", "", "holds no prompt"), ("sharegpt", "{}", "holds no prompt"),
     ("sharegpt", "[1]", "no ShareGPT file"), ("custom", "nonsense", "line 1")],
)  # fmt: skip
def test_files_that_are_no_data_sets_are_refused(name: str, text: str, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UsageError, match=reason):
        samples(Words(), "--dataset-name", name, "--dataset-path", str(path))
