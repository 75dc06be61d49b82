"""Incremental decoding gives what decoding everything at once gives, and never half a code point."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvpage.text.detokenizer import MAX_HELD_BYTES, Detokenizer
from kvpage.text.tokenizer import FastTokenizer, Tokenizer, wrap_tokenizer

PROMPTS = ["", "The block", "Grüße 你好 the", "😀 of", "ends with a space ", "\n"]


def fast(backend: Any) -> FastTokenizer:
    return FastTokenizer(backend, special_tokens={"bos_token": "<s>", "eos_token": "</s>"}, chat_templates={})


def streamed(
    tokenizer: Tokenizer, prompt: Sequence[int], chunks: Sequence[Sequence[int]], **options: Any
) -> str:
    detokenizer = Detokenizer(tokenizer, prompt, **options)
    deltas = [detokenizer.push(chunk) for chunk in chunks]
    for delta in deltas:
        delta.encode()  # no lone surrogate
    return "".join(deltas) + detokenizer.flush()


def in_context(tokenizer: Tokenizer, prompt: Sequence[int], output: Sequence[int], skip: bool) -> str:
    """What the output adds to the prompt's text."""
    before = tokenizer.decode(prompt, skip_special_tokens=skip)
    whole = tokenizer.decode([*prompt, *output], skip_special_tokens=skip)
    assert whole.startswith(before)
    return whole[len(before) :]


def byte_ids(tokenizer: Tokenizer, data: bytes) -> list[int]:
    """Token ids that spell the bytes one by one."""
    known = {tokenizer.token_bytes(index): index for index in reversed(range(tokenizer.vocab_size))}
    return [known[bytes([byte])] for byte in data]


def cut(ids: Sequence[int], seed: int) -> list[list[int]]:
    """The ids in random chunks, one token each more often than not, some empty."""
    rng = random.Random(seed)
    chunks: list[list[int]] = []
    rest = list(ids)
    while rest:
        size = rng.choice((1, 1, 1, 1, 2, 5, 0))
        chunks.append(rest[:size])
        rest = rest[size:]
    return chunks


@pytest.mark.parametrize("skip", [True, False])
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
def test_stream_of_random_ids_is_decode_of_all(backend: Any, skip: bool, data: st.DataObject) -> None:
    tokenizer = fast(backend)
    prompt = tokenizer.encode(data.draw(st.sampled_from(PROMPTS)))
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 3), max_size=40))
    chunks = cut(ids, data.draw(st.integers(0, 99)))
    assert streamed(tokenizer, prompt, chunks, skip_special_tokens=skip) == in_context(
        tokenizer, prompt, ids, skip
    )


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(text=st.text(max_size=40), seed=st.integers(0, 99))
def test_stream_of_any_text_is_decode_of_all(backend: Any, text: str, seed: int) -> None:
    tokenizer = fast(backend)
    prompt = tokenizer.encode("The block ")
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert streamed(tokenizer, prompt, cut(ids, seed)) == in_context(tokenizer, prompt, ids, True)


@pytest.mark.parametrize("name", ["byte_level", "gemma"])
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
def test_random_bytes_become_replacement_characters_as_in_decode(
    backends: dict[str, Any], name: str, data: st.DataObject
) -> None:
    tokenizer = fast(backends[name])
    ids = byte_ids(tokenizer, data.draw(st.binary(max_size=12)))
    assert streamed(tokenizer, [], [[index] for index in ids]) == tokenizer.decode(ids)


def test_code_point_split_over_tokens_comes_whole(backend: Any, kind: str) -> None:
    if kind not in ("byte_level", "llama2", "llama2_metaspace", "gemma"):
        return
    tokenizer = fast(backend)
    detokenizer = Detokenizer(tokenizer, tokenizer.encode("x"))
    ids = tokenizer.encode("🦄 你 ä́x", add_special_tokens=False)
    assert len(ids) > len("🦄 你 ä́x")
    deltas = [detokenizer.push([index]) for index in ids]
    assert "\ufffd" not in "".join(deltas)
    assert "".join(deltas) + detokenizer.flush() == in_context(tokenizer, tokenizer.encode("x"), ids, True)


def test_text_follows_each_token_of_plain_words(backends: dict[str, Any]) -> None:
    for name in ("byte_level", "llama2", "gemma"):
        tokenizer = fast(backends[name])
        detokenizer = Detokenizer(tokenizer, tokenizer.encode("The"))
        for index in tokenizer.encode("block table of each sequence", add_special_tokens=False):
            assert detokenizer.push([index]) == tokenizer.token_text(index)


def test_space_before_the_first_word_depends_on_the_prompt(backends: dict[str, Any]) -> None:
    tokenizer = fast(backends["llama2"])
    ids = tokenizer.encode("block", add_special_tokens=False)
    assert streamed(tokenizer, tokenizer.encode("The"), [ids]) == " block"
    assert streamed(tokenizer, tokenizer.encode(""), [ids]) == "block"


@pytest.mark.parametrize("name", ["byte_level", "gemma"])
@pytest.mark.parametrize("known", [1, 2, 3])
def test_code_point_begun_by_the_prompt_is_completed_by_the_output(
    backends: dict[str, Any], name: str, known: int
) -> None:
    tokenizer = fast(backends[name])
    ids = byte_ids(tokenizer, "🦄".encode())
    prompt = [*tokenizer.encode("The block "), *ids[:known]]
    assert streamed(tokenizer, prompt, [[index] for index in ids[known:]]) == "🦄"
    assert streamed(tokenizer, prompt, []) == ""


def test_broken_code_point_of_the_prompt_is_not_the_outputs(backends: dict[str, Any]) -> None:
    tokenizer = fast(backends["byte_level"])
    prompt = [*tokenizer.encode("The"), *byte_ids(tokenizer, "🦄".encode()[:2])]
    output = tokenizer.encode(" block", add_special_tokens=False)
    assert streamed(tokenizer, prompt, [output]) == in_context(tokenizer, prompt, output, True) == " block"


@pytest.mark.parametrize("known", ["🦄", "🦄你"])
def test_output_that_breaks_the_prompts_run_of_bytes_is_replaced_alone(
    backends: dict[str, Any], known: str
) -> None:
    tokenizer = fast(backends["gemma"])
    prompt = [*tokenizer.encode("The "), *byte_ids(tokenizer, known.encode())]
    output = byte_ids(tokenizer, b"\xff\xe4")
    for extra in ([], byte_ids(tokenizer, b"\xe4")):
        text = streamed(tokenizer, [*prompt, *extra], [[index] for index in output])
        assert text == "\ufffd" * len(output)


def test_flush_gives_what_was_held_back(backends: dict[str, Any]) -> None:
    for name in ("byte_level", "gemma"):
        tokenizer = fast(backends[name])
        ids = byte_ids(tokenizer, "🦄".encode()[:3])
        detokenizer = Detokenizer(tokenizer, [])
        assert detokenizer.push(ids) == ""
        assert detokenizer.flush() == tokenizer.decode(ids) != ""
        assert detokenizer.flush() == ""


def test_long_run_of_byte_tokens_still_streams(backends: dict[str, Any]) -> None:
    tokenizer = fast(backends["gemma"])
    text = "한국어" * 40
    detokenizer = Detokenizer(tokenizer, [])
    held = 0
    given: list[str] = []
    for index in tokenizer.encode(text, add_special_tokens=False):
        given.append(detokenizer.push([index]))
        held = 0 if given[-1] else held + 1
        assert held <= MAX_HELD_BYTES + 3
    assert "".join(given) + detokenizer.flush() == text


def test_special_tokens_are_shown_on_request(backends: dict[str, Any]) -> None:
    tokenizer = fast(backends["byte_level"])
    ids = tokenizer.encode("a<|im_start|>b</s>", add_special_tokens=False)
    assert streamed(tokenizer, [], [ids]) == "ab"
    assert streamed(tokenizer, [], [ids], skip_special_tokens=False) == "a<|im_start|>b</s>"


def test_long_prompt_costs_no_more_than_a_short_one(backends: dict[str, Any]) -> None:
    class CountingPrompt(list[int]):
        reads = 0

        def __getitem__(self, index: Any) -> Any:
            CountingPrompt.reads += 1
            return super().__getitem__(index)

        def __reversed__(self) -> Any:
            for index in range(len(self) - 1, -1, -1):
                yield self[index]

    for name in ("byte_level", "llama2", "suffixed"):
        tokenizer = fast(backends[name])
        prompt = CountingPrompt(tokenizer.encode("The block pool ") * 1000)
        CountingPrompt.reads = 0
        Detokenizer(tokenizer, prompt)
        assert 0 < CountingPrompt.reads < 50


class SlowBytes:
    """A tokenizer with transformers' interface and no backend: ids are bytes, 256 is EOS, 257 a word."""

    bos_token_id = None
    eos_token_id = 256
    all_special_ids = (256,)
    special_tokens_map = {"eos_token": "</s>", "additional_special_tokens": ["<x>"]}
    chat_template = {"default": "{{ messages[0].content }}", "tool_use": "tools"}

    def __len__(self) -> int:
        return 258

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [*text.encode(), *([256] if add_special_tokens else [])]

    def decode(
        self, ids: list[int], skip_special_tokens: bool = False, spaces_between_special_tokens: bool = True
    ) -> str:
        gap = b" " if spaces_between_special_tokens else b""
        special = b"" if skip_special_tokens else gap + b"</s>"
        table = {256: special, 257: b" word"}
        return b"".join(
            table.get(index) or (b"" if index == 256 else bytes([index])) for index in ids
        ).decode(errors="replace")


def test_tokenizer_without_backend_streams_through_its_own_decode() -> None:
    tokenizer = wrap_tokenizer(SlowBytes())
    assert (tokenizer.vocab_size, tokenizer.eos_token_id, tokenizer.all_special_ids) == (258, 256, {256})
    assert (tokenizer.special_tokens, tokenizer.encode("a")) == ({"eos_token": "</s>"}, [97, 256])
    assert tokenizer.chat_template == SlowBytes.chat_template["default"]
    ids = [*"héllo 你好🦄".encode(), 257, 256, 0xE2, 0x82, 256, *b"!", 0xE2]
    for skip in (True, False):
        for seed in range(20):
            chunks = cut(ids, seed)
            text = streamed(tokenizer, [65], chunks, skip_special_tokens=skip)
            assert text == tokenizer.decode(ids, skip_special_tokens=skip)
    spaced = streamed(tokenizer, [65], [ids], skip_special_tokens=False, spaces_between_special_tokens=False)
    assert " </s>" not in spaced
    assert "</s>" in spaced
    detokenizer = Detokenizer(tokenizer, [65])
    assert [detokenizer.push([index]) for index in "é".encode()] == ["", "é"]


class SlowWords(SlowBytes):
    """Ids are words with a space between them, 0 is special."""

    all_special_ids = (0,)

    def decode(
        self, ids: list[int], skip_special_tokens: bool = False, spaces_between_special_tokens: bool = True
    ) -> str:
        return " ".join(f"w{index}" for index in ids if index or not skip_special_tokens)


def test_word_after_special_tokens_only_is_still_not_the_first() -> None:
    tokenizer = wrap_tokenizer(SlowWords())
    assert streamed(tokenizer, [1, *[0] * 50], [[2], [0], [3]]) == " w2 w3"
    assert streamed(tokenizer, [0] * 50, [[2], [0], [3]]) == "w2 w3"
