"""The commands that run a model, on a tiny one with made-up weights: what they print is what the engine gives."""

from __future__ import annotations

import io
import json
import signal
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvpage import Engine, RequestError, SamplingParams
from kvpage.cli.chat import Conversation
from kvpage.cli.main import main

QUIET = ("--load-format", "dummy", "--log-level", "error", "--num-kv-blocks", "64")


@pytest.fixture(scope="module")
def engine(checkpoint: str) -> Iterator[Engine]:
    with Engine(checkpoint, load_format="dummy", num_kv_blocks=64) as made:
        yield made


@pytest.fixture
def no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))


def generate(capsys: pytest.CaptureFixture[str], checkpoint: str, *arguments: str) -> str:
    status = main(
        ["generate", "--model", checkpoint, *QUIET, "--max-tokens", "6", "--temperature", "0", *arguments]
    )
    captured = capsys.readouterr()
    assert (status, captured.err) == (0, "")
    return captured.out


def asked(engine: Engine, text: str, **options: Any) -> str:
    params = SamplingParams(max_tokens=6, temperature=0, **options)
    return engine.chat([{"role": "user", "content": text}], params, progress=False)[0].outputs[0].text


def continued(engine: Engine, text: str) -> str:
    return (
        engine.generate(text, SamplingParams(max_tokens=6, temperature=0), progress=False)[0].outputs[0].text
    )


def test_generate_quantizes_while_loading(capsys: pytest.CaptureFixture[str], checkpoint: str) -> None:
    with Engine(checkpoint, load_format="dummy", num_kv_blocks=64, quantization="int8") as engine:
        expected = continued(engine, "hello")
    assert generate(capsys, checkpoint, "--raw", "--quantization", "int8", "hello") == expected + "\n"


def test_a_prompt_is_asked_through_the_chat_template(
    checkpoint: str, engine: Engine, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate(capsys, checkpoint, "hello") == asked(engine, "hello") + "\n"


def test_raw_continues_the_text(checkpoint: str, engine: Engine, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate(capsys, checkpoint, "--raw", "hello") == continued(engine, "hello") + "\n"


def test_stdin_is_the_prompt_where_there_is_none(
    checkpoint: str, engine: Engine, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("from a pipe"))
    assert generate(capsys, checkpoint, "--raw") == continued(engine, "from a pipe") + "\n"


def test_several_prompts_keep_their_order_and_are_headed(
    checkpoint: str, engine: Engine, capsys: pytest.CaptureFixture[str]
) -> None:
    out = generate(capsys, checkpoint, "one", "two")
    assert out == f"==> one\n{asked(engine, 'one')}\n==> two\n{asked(engine, 'two')}\n"


def test_json_has_tokens_and_reasons_a_line_a_prompt(
    checkpoint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = generate(capsys, checkpoint, "--json", "--raw", "--logprobs", "2", "one", "two").splitlines()
    first, second = (json.loads(line) for line in lines)
    assert [first["prompt"], second["prompt"]] == ["one", "two"]
    (choice,) = first["outputs"]
    assert choice["finish_reason"] in ("length", "stop")
    assert len(choice["logprobs"]) == len(choice["token_ids"])
    assert str(choice["token_ids"][0]) in choice["logprobs"][0]


def test_stats_tell_tokens_and_time_on_stderr(checkpoint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(
            ["generate", "hi", "--model", checkpoint, *QUIET, "--max-tokens", "3", "--ignore-eos", "--stats"]
        )
        == 0
    )
    assert ", 3 new in " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["hi", "--temperature", "0", "--n", "2"], "--n 2"),
        (["hi", "--max-model-len", "100000"], "or --allow-long-max-model-len to"),
        (["hi", "--chat", "--raw"], "not allowed with"),
        ([""], "empty"),
        (["hi", "--model", "./nowhere"], "nowhere"),
    ],
)
def test_what_cannot_be_served_is_status_2(
    checkpoint: str, arguments: list[str], word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", "--model", checkpoint, *QUIET, *arguments]) == 2
    assert word in capsys.readouterr().err


def test_a_piped_chat_answers_each_line_with_what_was_said_before(
    checkpoint: str, engine: Engine, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\n\ntwo\n/reset\none\n/exit\nnever\n"))
    assert main(["chat", checkpoint, *QUIET, "--max-tokens", "6", "--temperature", "0"]) == 0
    first = asked(engine, "one")
    messages = [
        {"role": role, "content": text}
        for role, text in (("user", "one"), ("assistant", first), ("user", "two"))
    ]
    second = (
        engine.chat(messages, SamplingParams(max_tokens=6, temperature=0), progress=False)[0].outputs[0].text
    )
    assert capsys.readouterr().out == f"{first}\n{second}\n{first}\n"


def test_a_piped_chat_that_could_not_ask_a_line_is_status_1(
    checkpoint: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{'x' * 500}\none\n"))
    assert main(["chat", checkpoint, *QUIET, "--max-tokens", "2"]) == 1
    assert capsys.readouterr().err.count("/reset") == 1
    assert main(["chat", checkpoint, *QUIET, "--quick", "x" * 500]) == 2


def test_a_system_message_begins_a_new_conversation(
    engine: Engine, capsys: pytest.CaptureFixture[str]
) -> None:
    conversation = Conversation(engine, SamplingParams(max_tokens=2, temperature=0), None, stats=False)
    conversation.take("one")
    conversation.take("/system be brief")
    assert conversation.messages == [{"role": "system", "content": "be brief"}]
    assert not conversation.take("/exit")
    assert conversation.take("/nonsense")
    assert "/nonsense" in capsys.readouterr().err


def test_control_c_stops_the_answer_and_keeps_the_conversation(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    conversation = Conversation(
        engine, SamplingParams(max_tokens=50, ignore_eos=True, temperature=0), None, stats=False
    )
    step, calls = engine.step, 0

    def press_control_c_in_step_five() -> bool:
        nonlocal calls
        calls += 1
        if calls == 5:
            signal.raise_signal(signal.SIGINT)
        return step()

    monkeypatch.setattr(engine, "step", press_control_c_in_step_five)
    handler = signal.getsignal(signal.SIGINT)
    assert conversation.take("go on")
    assert signal.getsignal(signal.SIGINT) is handler
    monkeypatch.undo()
    assert calls == 5
    assert [message["role"] for message in conversation.messages] == ["user", "assistant"]
    assert engine.stats().running == 0
    assert capsys.readouterr().out.endswith("\n")


def test_a_message_too_long_is_taken_back(engine: Engine, capsys: pytest.CaptureFixture[str]) -> None:
    conversation = Conversation(engine, SamplingParams(max_tokens=2), None, stats=False)
    assert conversation.take("x" * 500)
    assert conversation.messages == []
    assert "/reset" in capsys.readouterr().err


def test_a_model_without_template_says_so_at_once(checkpoint: str) -> None:
    with (
        Engine(checkpoint, load_format="dummy", num_kv_blocks=8, skip_tokenizer_init=True) as made,
        pytest.raises(RequestError, match="chat template"),
    ):
        Conversation(made, SamplingParams(), None, stats=False).check()


def test_inspect_prints_the_map_and_draws_it(
    checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "map.svg"
    blocks = ("--block-size", "16")  # of the shared prefix, two whole ones
    assert main(["inspect", checkpoint, *QUIET, *blocks, "--step", "3", "--svg", str(picture)]) == 0
    out = capsys.readouterr().out
    assert "2 forks" in out
    assert "2 shared" in out
    assert "request-5/0" in out
    assert ElementTree.parse(picture).getroot().tag.endswith("svg")
    assert main(["inspect", checkpoint, *QUIET, "--svg", str(tmp_path / "no" / "folder.svg")]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_inspect_gives_the_same_as_json(checkpoint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", checkpoint, *QUIET, "--step", "3", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["stats"]["forks"] == 2
    assert len(data["groups"][0]["blocks"]) == 64
    assert {sequence["request_id"] for sequence in data["sequences"]} == {
        f"request-{index}" for index in range(6)
    }


@pytest.mark.parametrize(("blocks", "words"), [("64", ", 0 preemptions, "), ("11", ", 1 preemption, ")])
def test_inspect_counts_in_words(
    checkpoint: str, blocks: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--block-size", "16", "--num-kv-blocks", blocks, "--requests", "2")
    assert main(["inspect", checkpoint, *QUIET, *flags]) == 0
    assert words in capsys.readouterr().out


@pytest.mark.parametrize("flags", [("--step", "-1"), ("--prefix-len", "-1"), ("--requests", "0")])
def test_inspect_refuses_numbers_without_sense(
    flags: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", *flags]) == 2
    assert f"{flags[0]} must be at least" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command",
    [
        ("inspect", "--step", "2"),
        ("bench", "latency", "--num-iters", "1", "--num-iters-warmup", "0"),
        ("bench", "throughput", "--num-prompts", "1"),
        ("bench", "throughput", "--num-prompts", "1", "--async-engine"),
    ],
)
def test_a_model_without_tokenizer_can_be_measured(
    checkpoint: str, tmp_path: Path, command: tuple[str, ...]
) -> None:
    (tmp_path / "config.json").write_bytes((Path(checkpoint) / "config.json").read_bytes())
    lengths = ("--output-len", "2", *(() if command[0] == "inspect" else ("--input-len", "3")))
    assert main([*command, *lengths, "--model", str(tmp_path), *QUIET]) == 0


@pytest.mark.parametrize("extra", [[], ["--async-engine"]])
def test_throughput_has_vllm_s_keys_and_counts_every_token(
    checkpoint: str, tmp_path: Path, extra: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "result.json"
    status = main(["bench", "throughput", checkpoint, *QUIET, "--num-prompts", "3", "--input-len", "5", "--output-len",
                   "4", "--num-warmups", "1", "--prefix-len", "2", "--output-json", str(file), *extra])  # fmt: skip
    assert status == 0
    assert capsys.readouterr().out.startswith("Throughput: ")
    result = json.loads(file.read_text())
    assert result["num_requests"] == 3
    assert result["total_num_tokens"] == 3 * (2 + 5 + 4)
    assert result["tokens_per_second"] == pytest.approx(result["total_num_tokens"] / result["elapsed_time"])
    assert result["environment"]["packages"]["torch"]


def test_latency_has_vllm_s_keys(checkpoint: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "--batch-size",
        "2",
        "--output-len",
        "3",
        "--num-iters-warmup",
        "1",
        "--num-iters",
        "4",
        "--json",
    ]
    assert main(["bench", "latency", checkpoint, *QUIET, *arguments]) == 0
    result = json.loads(capsys.readouterr().out)
    assert len(result["latencies"]) == 4
    assert list(result["percentiles"]) == ["10", "25", "50", "75", "90", "99"]
    assert min(result["latencies"]) <= result["percentiles"]["50"] <= max(result["latencies"])


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["bench"], "throughput, latency or serve"),
        (["bench", "speed"], "'speed'"),
        (["bench", "latency", "--batch-size", "0"], "--batch-size must be at least 1"),
    ],
)
def test_a_bench_without_sense_is_refused(
    arguments: list[str], word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    assert word in capsys.readouterr().err
