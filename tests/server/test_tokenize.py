"""POST /tokenize, POST /detokenize, GET /tokenizer_info."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from served_model import KEY, MODEL, ServedModel, serving


@pytest.fixture(scope="module")
def server(tiny: Path) -> Iterator[ServedModel]:
    with serving(tiny, enable_tokenizer_info=True, api_keys=(KEY,)) as running:
        yield running


def test_tokens_of_a_text_and_back(server: ServedModel) -> None:
    text = "Grüße aus Köln 😀"
    answer = server.post("/tokenize", model=MODEL, prompt=text, return_token_strs=True).json()
    tokenizer = server.service.engine.tokenizer
    assert tokenizer is not None
    assert answer["tokens"] == tokenizer.encode(text)
    assert answer["count"] == len(answer["tokens"]) == len(answer["token_strs"])
    assert answer["max_model_len"] == 512
    assert answer["token_strs"][0] == "<s>"
    assert server.post("/detokenize", tokens=answer["tokens"]).json() == {"prompt": "<s>" + text}


def test_special_tokens_can_be_left_out(server: ServedModel) -> None:
    plain = server.post("/tokenize", prompt="hello", add_special_tokens=False).json()
    assert server.post("/tokenize", prompt="hello").json()["tokens"] == [1, *plain["tokens"]]
    assert plain["token_strs"] is None


def test_a_conversation_has_the_tokens_that_a_chat_completion_counts(server: ServedModel) -> None:
    messages = [{"role": "user", "content": "hello"}]
    answer = server.post("/tokenize", messages=messages).json()
    chat = server.post("/v1/chat/completions", messages=messages, max_tokens=1).json()
    assert answer["count"] == chat["usage"]["prompt_tokens"]
    unopened = server.post("/tokenize", messages=messages, add_generation_prompt=False).json()
    assert answer["tokens"][: unopened["count"]] == unopened["tokens"]
    assert answer["count"] == unopened["count"] + 1


def test_a_long_text_is_tokenized_whole(server: ServedModel) -> None:
    text = "the block pool " * 5000
    tokens = server.post("/tokenize", prompt=text, add_special_tokens=False).json()["tokens"]
    assert server.post("/detokenize", tokens=tokens).json()["prompt"] == text


def test_the_tokenizer_describes_itself_where_it_is_asked_for(server: ServedModel) -> None:
    info = server.http.get("/tokenizer_info").json()
    assert info["chat_template"].startswith("{{ bos_token }}")
    assert info["bos_token"] == "<s>"
    assert info["vocab_size"] == server.service.engine.tokenizer.vocab_size  # type: ignore[union-attr]


def test_the_routes_need_the_key(server: ServedModel) -> None:
    for method, path in (("POST", "/tokenize"), ("POST", "/detokenize"), ("GET", "/tokenizer_info")):
        answer = server.http.request(method, path, headers={"authorization": "Bearer wrong"})
        assert answer.status_code == 401


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": []}, "prompt"),
        ("/tokenize", {"prompt": 5}, "body.prompt"),
        ("/tokenize", {"messages": [{"content": "a"}]}, "messages"),
        ("/tokenize", {"prompt": "\ud800"}, "prompt"),
        (
            "/tokenize",
            {"messages": [{"role": "user", "content": "a"}], "chat_template": "x"},
            "chat_template",
        ),
        ("/detokenize", {}, "body.tokens"),
        ("/detokenize", {"tokens": "abc"}, "body.tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
        ("/detokenize", {"tokens": [10**30]}, "tokens"),
    ],
)
def test_a_wrong_request_is_refused_by_name(
    server: ServedModel, path: str, body: dict[str, object], param: str
) -> None:
    status, named, message = server.refusal(path, **body)
    assert (status, named) == (400, param), message
