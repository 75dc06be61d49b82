"""``kvpage run-batch``: an entry for every line, in order, whatever the line holds."""

from __future__ import annotations

import asyncio
import io
import json
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI, Request
from starlette.responses import JSONResponse

from kvpage import Engine, KvpageError, SamplingParams
from kvpage_server.batch import answer_file, parse_line, read_lines
from kvpage_server.run_batch import run

Entry = dict[str, Any]


def line(custom_id: str, body: dict[str, Any], url: str = "/v1/completions") -> str:
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": url, "body": body})


def batch(tmp_path: Path, lines: list[str], *flags: str) -> list[Entry]:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("\n".join(lines), encoding="utf-8")
    assert run(["-i", str(source), "-o", str(target), "--num-kv-blocks", "64", *flags]) == 0
    return [json.loads(entry) for entry in target.read_text(encoding="utf-8").splitlines()]


def test_every_line_has_its_answer_in_order(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    greedy = {"max_tokens": 4, "temperature": 0}
    entries = batch(
        tmp_path,
        [
            line("a", {"model": "mine", "prompt": "Once", **greedy}),
            "",
            line("b", {"messages": [{"role": "user", "content": "hi"}], **greedy}, "/v1/chat/completions"),
            "no json",
            line("c", {"prompt": "Once", "max_tokens": -1}),
            line("d", {"input": "Once"}, "/v1/embeddings"),
            line("e", {"model": "other", "prompt": "Once"}),
        ],
        "--served-model-name",
        "mine",
    )
    assert [entry["custom_id"] for entry in entries] == ["a", "b", None, "c", "d", "e"]
    assert [entry["response"]["status_code"] for entry in entries] == [200, 200, 400, 400, 200, 404]
    assert [entry["error"] is None for entry in entries] == [True, True, False, False, True, False]
    with Engine("demo", num_kv_blocks=64) as engine:
        (output,) = engine.generate("Once", SamplingParams(max_tokens=4, temperature=0), progress=False)
    assert entries[0]["response"]["body"]["choices"][0]["text"] == output.outputs[0].text
    assert entries[1]["response"]["body"]["choices"][0]["message"]["role"] == "assistant"
    assert entries[3]["error"]["param"] == "max_tokens"
    assert entries[0]["response"]["body"]["id"] == f"cmpl-{entries[0]['response']['request_id']}"
    assert capsys.readouterr().err.endswith(f"3 answered, 3 failed: {tmp_path / 'out.jsonl'}\n")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[]", "custom_id"),
        ('{"custom_id": 3}', "custom_id"),
        ('{"custom_id": "x", "url": "/v1/score", "body": {}}', "must be one of /v1/chat/completions"),
        ('{"custom_id": "x", "url": "/v1/completions", "body": []}', "must be an object"),
        ('{"custom_id": "x", "method": "GET", "url": "/v1/completions", "body": {}}', 'must be "POST"'),
        ('{"custom_id": "x", "url": "/v1/completions", "body": {"stream": true}}', "leave stream out"),
        ("[" * 100_000, "not JSON"),
        ("\udcff", "not JSON"),
    ],
)
def test_a_line_that_asks_for_nothing_says_why(text: str, reason: str) -> None:
    entries, _ = asyncio.run(answered([text.encode("utf-8", "surrogateescape")], FastAPI()))
    assert reason in entries[0]["error"]["message"]
    assert entries[0]["response"]["status_code"] == 400


async def answered(lines: list[bytes], app: FastAPI, **options: int) -> tuple[list[Entry], Any]:
    entries: list[Entry] = []
    count = await answer_file(
        app, io.BytesIO(b"\n".join(lines)), entries.append, **{"at_once": 4, "longest": 1_000_000, **options}
    )
    return entries, count


async def turns(count: int) -> None:
    """Let the loop run whatever is ready, so many times."""
    for _ in range(count):
        await asyncio.sleep(0)


class Slow:
    """An application whose answers wait until they are released; earlier lines end last."""

    def __init__(self) -> None:
        self.running, self.most = 0, 0
        self.release = asyncio.Event()
        self.app = FastAPI()
        self.app.add_api_route("/v1/completions", self.complete, methods=["POST"])

    async def complete(self, request: Request) -> JSONResponse:
        body = await request.json()
        self.running += 1
        self.most = max(self.most, self.running)
        if body.get("wait"):
            await self.release.wait()
        self.running -= 1
        return JSONResponse({"prompt": body["prompt"]})


def test_order_is_kept_and_no_more_run_at_once_than_allowed() -> None:
    async def release(slow: Slow) -> None:
        while slow.running < 3:
            await asyncio.sleep(0)
        await turns(50)
        slow.release.set()

    async def check() -> None:
        slow = Slow()
        lines = [line(str(number), {"prompt": number, "wait": number < 3}).encode() for number in range(20)]
        releasing = asyncio.ensure_future(release(slow))
        entries, count = await answered(lines, slow.app, at_once=3)
        await releasing
        assert [entry["custom_id"] for entry in entries] == [str(number) for number in range(20)]
        assert (slow.most, count.answered, count.failed) == (3, 20, 0)

    asyncio.run(check())


def test_what_is_done_is_kept_when_it_is_cut_off() -> None:
    async def check() -> list[str]:
        slow = Slow()
        entries: list[Entry] = []
        lines = [line(str(number), {"prompt": number, "wait": number == 1}).encode() for number in range(4)]
        work = asyncio.ensure_future(
            answer_file(slow.app, io.BytesIO(b"\n".join(lines)), entries.append, at_once=4, longest=1000)
        )
        while slow.running != 1 or len(entries) != 1:
            await asyncio.sleep(0)
        await turns(50)
        work.cancel()
        with pytest.raises(asyncio.CancelledError):
            await work
        return [entry["custom_id"] for entry in entries]

    assert asyncio.run(check()) == ["0", "2", "3"]


def test_a_line_that_is_too_long_is_skipped_whole() -> None:
    lines = read_lines(io.BytesIO(b"a" * 10 + b"\r\n" + b"b" * 5000 + b"\n" + b"c" * 11 + b"\n\nd"), 10)
    assert [found and found.strip() for found in lines] == [b"a" * 10, None, None, b"d"]


def test_an_exception_within_a_request_is_the_entry_of_its_line() -> None:
    app = FastAPI()

    async def fail(request: Request) -> None:
        raise ValueError("secret")

    app.add_api_route("/v1/completions", fail, methods=["POST"])
    entries, count = asyncio.run(answered([line("x", {}).encode(), b"{}"], app))
    assert (entries[0]["response"]["status_code"], count.failed) == (500, 2)
    assert "secret" not in json.dumps(entries)


def test_bodies_reach_the_route_as_they_are() -> None:
    assert json.loads(parse_line(line("x", {"prompt": "\u00e9\ud800"}).encode()).body) == {
        "prompt": "\u00e9\ud800"
    }


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["-i", "none.jsonl", "-o", "out"], "none.jsonl: cannot be read"),
        (["-i", "in", "-o", "in"], "is the input file too"),
        (["-i", "in", "-o", "none/out"], "cannot be written"),
        (["-i", "in"], "required"),
        (["-i", "in", "-o", "out", "--max-concurrency", "0"], "at least 1"),
        (["-i", "in", "-o", "out", "--enable-metrics"], "a batch serves nothing"),
        (
            ["-i", "in", "-o", "out", "--enable-lora"],
            "kvpage run-batch: --enable-lora: LoRA has not landed yet",
        ),
        (["-i", "http://127.0.0.1:9/x", "-o", "out"], "cannot be fetched"),
        (["-i", "in", "-o", "http://127.0.0.1:9/x", "--output-tmp-dir", "none"], "there is no such folder"),
    ],
)
def test_what_cannot_be_read_or_written_is_said_before_a_model_is_loaded(
    flags: list[str], reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("in").write_text(line("a", {"prompt": "x"}), encoding="utf-8")
    with pytest.raises(KvpageError, match=reason):
        run(flags)
