"""GET /kvpage/blocks and /kvpage/plan: what they tell, to whom, and what many viewers cost."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Awaitable, Callable, Iterator
from typing import Any
from xml.etree import ElementTree

import httpx
import pytest

from kvpage import AsyncEngine, PluginRegistry, SamplingParams
from kvpage_server import blocks
from kvpage_server.app import create_app
from kvpage_server.blocks import BlockWatch, ranges, runs
from kvpage_server.service import Service
from kvpage_server.settings import ServerSettings
from tiny_checkpoint import write_checkpoint

PROMPT = "The block pool hands out blocks, and the prefix index finds them again."
TOTAL = 64
LONG = SamplingParams(max_tokens=200, ignore_eos=True, n=2)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AsyncEngine]:
    engine = AsyncEngine(
        write_checkpoint(tmp_path_factory.mktemp("models") / "tiny"), num_kv_blocks=TOTAL, block_size=16
    )
    yield engine
    engine.close()


def on_server(
    engine: AsyncEngine, talk: Callable[[httpx.AsyncClient], Awaitable[Any]], **settings: object
) -> Any:
    """What ``talk`` returns, given a client of a server of ``engine``."""
    service = Service(engine, ServerSettings(model_names=("tiny",), **settings), PluginRegistry())

    async def run() -> Any:
        transport = httpx.ASGITransport(create_app(service))
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            return await talk(client)

    return asyncio.run(run())


def get(engine: AsyncEngine, path: str, headers: dict[str, str] | None = None, **settings: object) -> Any:
    return on_server(engine, lambda client: client.get(path, headers=headers), **settings)


def unpacked(states: str) -> str:
    return "".join(letter * int(count) for count, letter in re.findall(r"(\d+)(\w)", states))


@pytest.mark.parametrize("path", ["/kvpage/blocks", "/kvpage/blocks?format=svg", "/kvpage/plan"])
def test_only_who_has_a_key_may_look(engine: AsyncEngine, path: str) -> None:
    keys = ("sk-1", "sk-2")

    async def talk(client: httpx.AsyncClient) -> list[httpx.Response]:
        headers = [{}, {"Authorization": "Bearer sk-3"}, {"Authorization": "Bearer sk-2"}]
        return [await client.get(path, headers=header) for header in headers]

    *refused, answer = on_server(engine, talk, api_keys=keys)
    assert [reply.status_code for reply in refused] == [401, 401]
    assert answer.status_code == 200
    assert answer.headers["cache-control"] == "no-store"


def test_the_map_says_of_every_block_what_it_holds_and_for_whom(engine: AsyncEngine) -> None:
    async def talk(client: httpx.AsyncClient) -> dict[str, Any]:
        async with engine.generate(PROMPT, LONG, request_id="mine") as handle:
            async for _ in handle:
                answer = (await client.get("/kvpage/blocks")).json()
                if answer["engine"]["running"] == 2:  # the prompt is computed, and both choices go on from it
                    return answer
        raise AssertionError("the request ended before it was seen with two choices")

    answer = on_server(engine, talk)
    (group,) = answer["groups"]
    letters = unpacked(group["states"])
    assert len(letters) == group["total"] == TOTAL
    for state, letter in (("used", "u"), ("shared", "s")):
        assert letters.lower().count(letter) == group[state]
    assert (letters.count("c"), letters.count("f")) == (group["cached"], group["free"])
    shared = {number for number, letter in enumerate(letters, 1) if letter in "sS"}
    assert shared == {int(number) for number, holders in group["references"].items() if holders == 2} != set()
    assert [(s["request_id"], s["choice"], s["state"]) for s in answer["sequences"]] == [
        ("mine", 0, "running"), ("mine", 1, "running"),
    ]  # fmt: skip
    assert answer["sequences"][0]["known"] > 16
    assert PROMPT not in json.dumps(answer)


def test_blocks_are_free_or_cached_once_the_request_is_cancelled(engine: AsyncEngine) -> None:
    async def talk(client: httpx.AsyncClient) -> dict[str, Any]:
        handle = engine.generate(PROMPT, LONG)
        await anext(aiter(handle))
        await handle.aclose()
        answer: dict[str, Any] = (await client.get("/kvpage/blocks")).json()
        return answer

    answer = on_server(engine, talk)
    (group,) = answer["groups"]
    assert (group["used"], group["shared"], answer["sequences"]) == (0, 0, [])
    assert group["cached"] > 0
    assert set(unpacked(group["states"])) == {"c", "f"}


def test_the_picture_is_svg_that_runs_nothing(engine: AsyncEngine) -> None:
    answer = get(engine, "/kvpage/blocks?format=svg")
    assert answer.headers["content-type"] == "image/svg+xml"
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert ElementTree.fromstring(answer.text).tag.endswith("svg")


def test_an_unknown_format_is_refused(engine: AsyncEngine) -> None:
    answer = get(engine, "/kvpage/blocks?format=png")
    assert answer.status_code == 400
    assert "format" in answer.json()["error"]["param"]


def test_many_viewers_cost_one_look(engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    inspect = engine.inspect
    monkeypatch.setattr(engine, "inspect", lambda: taken.append(1) or inspect())
    monkeypatch.setattr(blocks, "COUNTS_AGE", 60.0)

    async def talk(client: httpx.AsyncClient) -> list[bytes]:
        answers = await asyncio.gather(*(client.get("/kvpage/blocks") for _ in range(30)))
        pictures = await asyncio.gather(*(client.get("/kvpage/blocks?format=svg") for _ in range(3)))
        return [*{answer.content for answer in answers}, *{answer.content for answer in pictures}]

    assert len(on_server(engine, talk)) == 2
    assert len(taken) == 1


def test_of_a_large_pool_the_counts_are_new_and_the_map_may_be_older(
    engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "COUNTS_AGE", 0.0)
    monkeypatch.setattr(blocks, "MAP_AGE_PER_BLOCK", 60.0)

    async def run() -> None:
        watch = BlockWatch(engine, {})
        first, second = await watch.look(), await watch.look()
        assert second.taken > first.taken
        assert second.map_taken == first.map_taken

    asyncio.run(run())


def test_a_viewer_that_goes_away_ends_nothing_for_the_others(engine: AsyncEngine) -> None:
    async def run() -> None:
        watch = BlockWatch(engine, {})
        impatient = asyncio.create_task(watch.look())
        patient = asyncio.create_task(watch.look())
        await asyncio.sleep(0)
        impatient.cancel()
        assert (await patient).body
        with pytest.raises(asyncio.CancelledError):
            await impatient

    asyncio.run(run())


def test_after_the_engine_has_ended_a_look_is_an_error_object(tmp_path: Any) -> None:
    engine = AsyncEngine(write_checkpoint(tmp_path / "tiny"), num_kv_blocks=8)
    engine.close()
    answer = get(engine, "/kvpage/blocks")
    assert answer.status_code == 500
    assert answer.json()["error"]["type"] == "EngineDeadError"


def test_the_plan_gives_every_value_with_its_reason(engine: AsyncEngine) -> None:
    plan = get(engine, "/kvpage/plan").json()
    values = {value["name"]: value for value in plan["values"]}
    assert values["num_blocks"] == {
        "name": "num_blocks",
        "value": [TOTAL],
        "reason": f"num_kv_blocks={TOTAL} given",
    }
    assert values["max_model_len"]["reason"] == "the model's context"
    assert values["kv_bytes"]["value"] == engine.config.kv_bytes


@pytest.mark.parametrize(
    ("numbers", "text"),
    [([], ""), ([4], "4"), ([1, 2, 3, 7], "1-3 7"), ([3, 2, 1], "3 2 1"), ([0, 0, 5, 6], "5-6")],
)
def test_tables_are_packed_as_ranges(numbers: list[int], text: str) -> None:
    assert ranges(numbers) == text


@pytest.mark.parametrize("letters", ["", "f", "uuusff", "UuS"])
def test_states_are_packed_as_runs(letters: str) -> None:
    assert unpacked(runs(letters)) == letters
