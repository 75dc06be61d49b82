"""``kvpage chat --url`` and ``kvpage complete``: a server's answers as they come, and texts continued here."""

from __future__ import annotations

import io
import sys
from typing import Any

import pytest
from stub_server import MODEL, Stub, serving

from kvpage import Engine, SamplingParams
from kvpage.cli import remote_text
from kvpage.cli.main import main

Capture = pytest.CaptureFixture[str]


def pipe(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))


def chat(stub: Stub, *arguments: str) -> int:
    return main(["chat", "--url", f"{stub.url}/v1", *arguments])


def test_a_quick_question_is_answered_by_the_first_model(capsys: Capture) -> None:
    with serving() as stub:
        assert chat(stub, "-q", "hello") == 0
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("one two three\n", f"model: {MODEL}\n")
    path, _, body = stub.seen[0]
    assert path == "/v1/chat/completions"
    assert body == {"model": MODEL, "stream": True, "messages": [{"role": "user", "content": "hello"}]}


def test_a_conversation_remembers_what_was_said(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    pipe(monkeypatch, "first\nsecond\n/reset\nthird\n")
    with serving() as stub:
        assert chat(stub, "--system-prompt", "be brief", "--model-name", "other") == 0
    said = [[message["content"] for message in body["messages"]] for _, _, body in stub.seen]
    answer = "one two three"
    assert said == [["be brief", "first"], ["be brief", "first", answer, "second"], ["be brief", "third"]]
    assert stub.seen[0][2]["model"] == "other"
    assert capsys.readouterr().out == 3 * f"{answer}\n"


def test_the_key_and_sampling_flags_are_sent(capsys: Capture) -> None:
    with serving() as stub:
        status = chat(stub, "--quick", "x", "--api-key", "secret", "--temperature", "0.5", "--max-tokens", "4",
                      "--stop", "END", "--seed", "3")  # fmt: skip
    _, headers, body = stub.seen[0]
    assert status == 0
    assert headers["authorization"] == "Bearer secret"
    assert (body["temperature"], body["max_tokens"], body["stop"], body["seed"]) == (0.5, 4, ["END"], 3)


def test_stats_are_told_on_stderr(capsys: Capture) -> None:
    with serving() as stub:
        assert chat(stub, "-q", "x", "--stats", "--model-name", MODEL) == 0
    assert stub.seen[0][2]["stream_options"] == {"include_usage": True}
    assert capsys.readouterr().err.startswith("7 prompt tokens, 3 new in ")


def test_an_address_without_a_path_means_v1(capsys: Capture) -> None:
    with serving() as stub:
        assert main(["chat", f"--url={stub.url}/", "-q", "x"]) == 0
    assert stub.seen[0][0] == "/v1/chat/completions"


def test_what_a_server_refuses_is_said_and_taken_back(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    pipe(monkeypatch, "too long\nshort\n")
    with serving(refuse=(400, "the prompt is too long"), refusals=1) as stub:
        assert chat(stub) == 1
    assert "error: HTTP 400: the prompt is too long" in capsys.readouterr().err
    assert [message["content"] for message in stub.seen[1][2]["messages"]] == ["short"]


def test_an_error_in_the_middle_of_an_answer_is_said(capsys: Capture) -> None:
    with serving(break_after=1) as stub:
        assert chat(stub, "-q", "x") == 2
    captured = capsys.readouterr()
    assert captured.out.startswith("one")
    assert "the step failed" in captured.err


def test_a_key_that_is_missing_is_said(capsys: Capture) -> None:
    with serving(refuse=(401, "no key was sent")) as stub:
        assert chat(stub, "-q", "x") == 2
    assert "HTTP 401: no key was sent" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["chat", "complete"])
def test_a_server_that_is_not_there_is_said_so(command: str, capsys: Capture) -> None:
    with serving() as stub:
        pass
    assert main([command, "--url", stub.url, "-q", "x"]) == 2
    assert "is the server up? (kvpage serve MODEL)" in capsys.readouterr().err


def test_an_address_that_is_none_is_refused(capsys: Capture) -> None:
    assert main(["chat", "--url", "localhost:8000", "-q", "x"]) == 2
    assert "it begins with http://" in capsys.readouterr().err


def interrupt_after(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """Ctrl-C, as it would arrive while the next chunk is waited for."""
    left = [count]
    read_event = remote_text.read_event

    def read(data: str) -> dict[str, Any]:
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        return read_event(data)

    monkeypatch.setattr(remote_text, "read_event", read)


def test_ctrl_c_ends_the_command_where_nobody_types(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    interrupt_after(monkeypatch, 3)
    with serving() as stub:
        assert chat(stub, "-q", "x") == 130
    assert capsys.readouterr().out == "one\n"


def test_ctrl_c_ends_the_answer_where_somebody_types(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stdin", Terminal("first\nsecond\n"))
    interrupt_after(monkeypatch, 4)
    with serving() as stub:
        assert chat(stub) == 0
    assert [message["content"] for message in stub.seen[1][2]["messages"]] == ["first", "one two", "second"]


def test_texts_are_completed_by_a_server(capsys: Capture) -> None:
    with serving() as stub:
        assert main(["complete", "--url", f"{stub.url}/v1", "Once", "Twice", "--max-tokens", "5"]) == 0
    assert [(path, body["prompt"], body["max_tokens"]) for path, _, body in stub.seen] == [
        ("/v1/completions", "Once", 5),
        ("/v1/completions", "Twice", 5),
    ]
    assert capsys.readouterr().out == 2 * "one two three\n"


def test_each_line_of_stdin_is_completed(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    pipe(monkeypatch, "a\n\nb\n")
    with serving() as stub:
        assert main(["complete", "--url", stub.url]) == 0
    assert [body["prompt"] for _, _, body in stub.seen] == ["a", "b"]


def test_without_a_server_a_text_is_continued_here(checkpoint: str, capsys: Capture) -> None:
    flags = ["--model", checkpoint, "--load-format", "dummy", "--num-kv-blocks", "64", "--log-level", "error"]
    assert main(["complete", *flags, "--max-tokens", "6", "--temperature", "0", "--quick", "hello"]) == 0
    with Engine(checkpoint, load_format="dummy", num_kv_blocks=64) as engine:
        (output,) = engine.generate("hello", SamplingParams(max_tokens=6, temperature=0), progress=False)
    assert capsys.readouterr().out == output.outputs[0].text + "\n"


def test_completing_takes_no_flags_of_chats(capsys: Capture) -> None:
    assert main(["complete", "--system", "x", "y"]) == 2
    assert "unknown flag --system" in capsys.readouterr().err


def test_without_httpx_the_way_to_it_is_named(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "httpx", None)
    assert main(["chat", "--url", "http://localhost:1", "-q", "x"]) == 2
    assert "pip install 'kvpage[server]'" in capsys.readouterr().err
