"""POST /v1/embeddings, as the official client and others use it."""

from __future__ import annotations

import base64
import math
from array import array
from collections.abc import Iterator
from pathlib import Path

import pytest
from served_model import MODEL, ServedModel, serving

URL = "/v1/embeddings"


@pytest.fixture(scope="module")
def server(tiny: Path) -> Iterator[ServedModel]:
    with serving(tiny) as running:
        yield running


def vectors(server: ServedModel, given: object, **more: object) -> list[list[float]]:
    answer = server.post(URL, **{"model": MODEL, "input": given, **more})
    assert answer.status_code == 200, answer.text
    data = answer.json()["data"]
    assert [entry["index"] for entry in data] == list(range(len(data)))
    return [entry["embedding"] for entry in data]


def test_the_official_client_reads_unit_vectors_in_the_order_of_the_inputs(server: ServedModel) -> None:
    texts = ["the block pool", "paged attention", "the block pool"]
    answer = server.client.embeddings.create(model=MODEL, input=texts)
    assert answer.object == "list"
    assert answer.model == MODEL
    assert [entry.index for entry in answer.data] == [0, 1, 2]
    assert answer.data[0].embedding == answer.data[2].embedding != answer.data[1].embedding
    for entry in answer.data:
        assert entry.object == "embedding"
        assert len(entry.embedding) == 32
        assert math.isclose(math.fsum(x * x for x in entry.embedding), 1.0, rel_tol=1e-5)
    tokenizer = server.service.engine.tokenizer
    assert tokenizer is not None
    tokens = sum(len(tokenizer.encode(text)) for text in texts)
    assert answer.usage.prompt_tokens == answer.usage.total_tokens == tokens


def test_base64_holds_the_same_numbers_as_little_endian_floats(server: ServedModel) -> None:
    (numbers,) = vectors(server, "one text", encoding_format="float")
    data = server.post(URL, input="one text", encoding_format="base64").json()["data"]
    decoded = array("f", base64.b64decode(data[0]["embedding"]))
    assert list(decoded) == [pytest.approx(x) for x in numbers]


def test_text_and_its_token_ids_have_the_same_vector(server: ServedModel) -> None:
    tokenizer = server.service.engine.tokenizer
    assert tokenizer is not None
    ids = tokenizer.encode("the same text")
    (text,) = vectors(server, "the same text")
    assert vectors(server, ids) == [text]
    assert vectors(server, [ids, ids[:2]])[0] == text
    assert vectors(server, ["the same text"]) == [text]


def test_a_conversation_is_embedded_as_its_template_writes_it(server: ServedModel) -> None:
    answer = server.post(URL, messages=[{"role": "user", "content": "hello"}])
    assert answer.status_code == 200
    assert vectors(server, "<s><|user|>hello", add_special_tokens=False) == [
        answer.json()["data"][0]["embedding"]
    ]


def test_truncation_keeps_the_end_or_the_beginning(server: ServedModel) -> None:
    ids = list(range(5, 25))
    assert vectors(server, ids, truncate_prompt_tokens=4) == vectors(server, ids[-4:])
    assert vectors(server, ids, truncate_prompt_tokens=4, truncation_side="right") == vectors(server, ids[:4])
    assert vectors(server, [7] * 600, truncate_prompt_tokens=-1)


def test_the_server_chooses_the_pooling(server: ServedModel, tiny: Path) -> None:
    with serving(tiny, pooling="mean") as mean:
        assert vectors(mean, "some text") != vectors(server, "some text")
        assert vectors(mean, [9]) == vectors(server, [9])


def test_normalize_false_gives_the_hidden_states_length(server: ServedModel) -> None:
    (raw,) = vectors(server, "text", normalize=False)
    (unit,) = vectors(server, "text")
    length = math.sqrt(math.fsum(x * x for x in raw))
    assert not math.isclose(length, 1.0, rel_tol=1e-2)
    assert [x / length for x in raw] == [pytest.approx(x, abs=1e-6) for x in unit]


def test_null_is_accepted_for_every_optional_field(server: ServedModel) -> None:
    names = ("model", "encoding_format", "dimensions", "user", "truncate_prompt_tokens", "messages", "normalize",
             "add_special_tokens", "cache_salt", "priority", "request_id", "chat_template", "truncation_side")  # fmt: skip
    assert vectors(server, "text", **dict.fromkeys(names)) == vectors(server, "text")


def test_what_is_unknown_is_named_in_a_header(server: ServedModel) -> None:
    answer = server.post(URL, input="text", embed_style="nice")
    assert answer.headers["x-kvpage-ignored-fields"] == "embed_style"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "input"),
        ({"input": ""}, "prompt"),
        ({"input": []}, "input"),
        ({"input": ["a", 1]}, "input"),
        ({"input": [[1], ["a"]]}, "input"),
        ({"input": {"text": "a"}}, "input"),
        ({"input": [1.5]}, "input"),
        ({"input": [100000]}, "prompt"),
        ({"input": [-1]}, "prompt"),
        ({"input": "a", "messages": []}, "input"),
        ({"messages": []}, "messages"),
        ({"input": "a", "dimensions": 8}, "dimensions"),
        ({"input": "a", "encoding_format": "hex"}, "encoding_format"),
        ({"input": "a", "truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ({"input": "a", "cache_salt": "a/b"}, "cache_salt"),
        ({"input": [5] * 600}, "input_tokens"),
        ({"input": "a", "encoding_format": 5}, "body.encoding_format"),
    ],
)
def test_a_wrong_request_is_refused_by_name(server: ServedModel, body: dict[str, object], param: str) -> None:
    status, named, message = server.refusal(URL, **body)
    assert (status, named) == (400, param), message


def test_an_unknown_model_is_not_found(server: ServedModel) -> None:
    assert server.refusal(URL, model="other", input="a")[:2] == (404, "model")
