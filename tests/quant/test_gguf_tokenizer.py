"""The tokenizer in a file gives the ids of the one it was made from."""

from __future__ import annotations

import functools
import itertools
import json
import logging
from pathlib import Path
from typing import Any

import pytest
from gguf_writer import gguf_bytes
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from kvpage.text.tokenizer import Tokenizer as EngineTokenizer
from kvpage.text.tokenizer import load_tokenizer
from kvpage_gguf.reader import GGUFReader

CORPUS = [
    "the quick brown fox jumps over the lazy dog, and the dog doesn't care; it's 1234 o'clock\n\n",
    "def main():\n    return [int(x) for x in '12 345 6789'.split()]\n",
    "Der schnelle Fuchs, naïve café, ÉCOLE, déjà vu; 速い茶色の狐 and emoji 🦊🦊",
] * 5
TEXTS = [
    "", " ", "hello world", "  two  spaces", "The dog doesn't, IT'S 12345 o'clock\r\n\n  x", "naïve café e\u0301",
    "CamelCaseWords HTMLParser", "tabs\tand\n\nnewlines \n ", "速い茶色の狐🦊 unseen: ☃ ж \u200d", "a/b//c\n/d 3.14159",
    "<s>special</s> and <|im_end|>", "x<think>y</think> z", "▁already▁", "    if x:\n        return 1",
]  # fmt: skip
CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
WORDS = {
    "llama-bpe": rf"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}{REST}",
    "qwen2": rf"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{REST}",
}
SPECIAL = ["<s>", "</s>", "<|im_end|>"]


def original(pre: str) -> Tokenizer:
    """A byte-level tokenizer as the makers of such models publish it, trained on a few sentences."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=pre == "llama-bpe"))
    bytewise = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre not in WORDS)
    steps: list[Any] = [bytewise]
    if pre in WORDS:
        steps.insert(0, pre_tokenizers.Split(Regex(WORDS[pre]), behavior="isolated"))
    if pre == "smollm":
        steps.insert(0, pre_tokenizers.Digits(individual_digits=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=SPECIAL, show_progress=False
    )  # fmt: skip
    tokenizer.train_from_iterator(CORPUS, trainer)
    learned = json.loads(tokenizer.to_str())["model"]
    vocabulary = {**learned["vocab"], "Ġzebra": len(learned["vocab"])}  # a word that no merges make
    merges = [tuple(pair) for pair in learned["merges"]]
    tokenizer.model = models.BPE(vocab=vocabulary, merges=merges, ignore_merges=pre == "llama-bpe")
    tokenizer.add_tokens([AddedToken("<think>", normalized=False), AddedToken("</think>", normalized=False)])
    return tokenizer


def stated(tokenizer: Tokenizer, pre: str) -> dict[str, Any]:
    """The keys that llama.cpp's converter writes for ``tokenizer``."""
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    tokens = sorted(vocabulary, key=lambda token: vocabulary[token])
    kinds = {**dict.fromkeys(SPECIAL, 3), "<think>": 4, "</think>": 4}
    return {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [kinds.get(token, 1) for token in tokens],
        "tokenizer.ggml.merges": [
            " ".join(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]
        ],
        "tokenizer.ggml.bos_token_id": vocabulary["<s>"],
        "tokenizer.ggml.eos_token_id": vocabulary["</s>"],
        "tokenizer.ggml.add_bos_token": pre == "llama-bpe",
        "tokenizer.chat_template": "{{ bos_token }}{{ messages[0]['content'] }}",
    }


def opened(path: Path, keys: dict[str, Any]) -> EngineTokenizer:
    """The tokenizer as an engine gets it."""
    path.write_bytes(gguf_bytes(keys, {}))
    reader = GGUFReader(path)
    return load_tokenizer(
        path.parent, tokenizer_json=reader.tokenizer(), tokenizer_config=reader.tokenizer_config()
    )


@pytest.mark.parametrize("pre", ["llama-bpe", "qwen2", "gpt-2", "smollm"])
def test_byte_level_ids_are_the_originals(pre: str, tmp_path: Path) -> None:
    expected = original(pre)
    if pre == "llama-bpe":
        expected.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    found = opened(tmp_path / "model.gguf", stated(expected, pre))
    for text in [*TEXTS, *CORPUS, "one zebra"]:
        ids = expected.encode(text).ids
        assert found.encode(text) == ids, text
        assert found.decode(ids) == expected.decode(ids), text
        assert found.decode(ids, skip_special_tokens=False) == expected.decode(
            ids, skip_special_tokens=False
        ), text


@functools.cache
def pieces() -> tuple[tuple[str, float, int], ...]:
    """(piece, score, type) of a SentencePiece-like vocabulary: bytes, then merged pieces, then characters."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.train_from_iterator(CORPUS[:2], trainers.BpeTrainer(vocab_size=260, show_progress=False))
    found = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3)]
    found += [(f"<0x{byte:02X}>", 0.0, 6) for byte in range(256)]
    vocabulary = tokenizer.get_vocab()
    learned = sorted(vocabulary, key=lambda token: (len(token) == 1, vocabulary[token]))
    found += [(token, -float(rank), 1) for rank, token in enumerate(learned)]
    return (*found, ("<|im_end|>", -1000.0, 3), ("<think>", -1000.0, 4), ("</think>", -1000.0, 4))


def sentencepiece_keys(**changes: Any) -> dict[str, Any]:
    keys = {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": [piece for piece, _, _ in pieces()],
        "tokenizer.ggml.scores": [score for _, score, _ in pieces()],
        "tokenizer.ggml.token_type": [kind for _, _, kind in pieces()],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }
    return keys | {f"tokenizer.ggml.{name}": value for name, value in changes.items()}


def by_scores(text: str, *, by_place: bool = False) -> list[int]:
    """SentencePiece's BPE by its definition: again and again the neighbours that make the best piece are joined."""
    places = {piece: index for index, (piece, _, _) in enumerate(pieces())}
    scores = {piece: -places[piece] if by_place else score for piece, score, kind in pieces() if kind == 1}
    symbols = list(text.replace(" ", "▁"))
    while True:
        joined = [
            (-scores[a + b], place)
            for place, (a, b) in enumerate(itertools.pairwise(symbols))
            if a + b in scores
        ]
        if not joined:
            break
        _, place = min(joined)
        symbols[place : place + 2] = ["".join(symbols[place : place + 2])]
    ids = []
    for symbol in symbols:
        ids += [places[symbol]] if symbol in scores else [3 + byte for byte in symbol.encode()]
    return ids


PLAIN = [text for text in TEXTS if "<" not in text]


def test_sentencepiece_ids_follow_from_the_scores(tmp_path: Path) -> None:
    found = opened(tmp_path / "model.gguf", sentencepiece_keys())
    for text in PLAIN + CORPUS:
        ids = found.encode(text)
        assert ids == [1, *by_scores(f" {text}" if text else "")], text
        assert found.decode(ids) == text.replace("▁", " "), text


@given(data=st.data())
def test_any_text_is_cut_as_the_scores_say(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    found = made_once(tmp_path_factory.getbasetemp() / "scores.gguf")
    some = st.sampled_from([piece.replace("▁", " ") for piece, _, kind in pieces() if kind == 1])
    for chosen in data.draw(st.lists(st.lists(some, max_size=14), min_size=8, max_size=8)):
        text = "".join(chosen)
        assert found.encode(text, add_special_tokens=False) == by_scores(f" {text}" if text else ""), text


@functools.cache
def made_once(path: Path) -> EngineTokenizer:
    return opened(path, sentencepiece_keys())


def test_special_pieces_are_found_and_what_lies_between_is_text(tmp_path: Path) -> None:
    found = opened(tmp_path / "model.gguf", sentencepiece_keys())
    last = len(pieces())
    assert found.encode("the<|im_end|>", add_special_tokens=False) == [*by_scores(" the"), last - 3]
    assert found.encode("<think></s>", add_special_tokens=False) == [last - 2, 2]
    assert found.decode([2, last - 2, last - 3]) == "<think>"
    assert found.all_special_ids >= {1, 2, last - 3}
    assert last - 2 not in found.all_special_ids


@pytest.mark.parametrize(("bos", "eos"), [(True, True), (False, True), (False, False)])
def test_bos_and_eos_are_added_as_the_file_says(bos: bool, eos: bool, tmp_path: Path) -> None:
    found = opened(tmp_path / "model.gguf", sentencepiece_keys(add_bos_token=bos, add_eos_token=eos))
    assert found.encode("the") == [1] * bos + by_scores(" the") + [2] * eos
    assert found.encode("the", add_special_tokens=False) == by_scores(" the")


def test_no_space_is_put_before_a_text_where_the_file_says_so(tmp_path: Path) -> None:
    found = opened(tmp_path / "model.gguf", sentencepiece_keys(add_space_prefix=False))
    assert found.encode("the dog") == [1, *by_scores("the dog")]
    assert found.decode(found.encode(" the dog")) == " the dog"


def test_gemmas_pieces_are_joined_in_their_order_and_runs_of_spaces_are_pieces(tmp_path: Path) -> None:
    keys = sentencepiece_keys(
        add_space_prefix=False, scores=[float(index) for index in range(len(pieces()) + 2)]
    )
    keys["tokenizer.ggml.tokens"] += ["  ", "   "]
    keys["tokenizer.ggml.token_type"] += [4, 4]
    found = opened(tmp_path / "model.gguf", {**keys, "general.architecture": "gemma2"})
    for text in ("the dog", " the dog doesn't", "over the lazy fox"):
        assert found.encode(text) == [1, *by_scores(text, by_place=True)]
    spaces = len(pieces())
    ids = [*by_scores("x"), spaces + 1]
    assert found.encode("x   ", add_special_tokens=False) == ids
    assert found.decode(ids) == "x   "
    later = [*by_scores("x"), spaces, *by_scores(" x", by_place=True)]  # " x" is an earlier piece than "  "
    assert found.encode("x   x", add_special_tokens=False) == later


def test_pieces_are_those_of_transformers_own_conversion(tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="transformers reads GGUF through that package")
    from transformers import AutoTokenizer

    found = opened(tmp_path / "model.gguf", sentencepiece_keys())
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    for text in PLAIN + CORPUS:
        if text.strip(" ▁") == text:  # before others theirs puts no space, where llama.cpp does
            assert found.encode(text) == theirs(text).input_ids, text


def test_special_tokens_and_templates_come_from_the_file_alone(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<wrong>", "chat_template": "wrong"}')
    (tmp_path / "chat_template.jinja").write_text("wrong")
    keys = stated(original("gpt-2"), "gpt-2")
    keys |= {"tokenizer.chat_templates": ["tool_use"], "tokenizer.chat_template.tool_use": "tools"}
    found = opened(tmp_path / "model.gguf", keys)
    assert found.special_tokens == {"bos_token": "<s>", "eos_token": "</s>"}
    assert found.chat_template == keys["tokenizer.chat_template"]
    assert found.chat_template_for(tools=True) == "tools"


def test_a_file_without_a_tokenizer_has_none(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(gguf_bytes({"general.architecture": "llama"}, {}))
    assert GGUFReader(tmp_path).tokenizer() is None


def test_an_unknown_way_of_cutting_words_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    expected = original("gpt-2")
    with caplog.at_level(logging.WARNING, "kvpage"):
        found = opened(tmp_path / "model.gguf", stated(expected, "of-tomorrow"))
    assert "'of-tomorrow'" in caplog.text
    assert found.encode(TEXTS[4]) == expected.encode(TEXTS[4]).ids


def test_every_token_that_ends_a_text_is_known(tmp_path: Path) -> None:
    keys = {
        **sentencepiece_keys(eot_token_id=300),
        "general.sampling.temp": 0.6,
        "general.sampling.top_k": 20,
    }
    (tmp_path / "model.gguf").write_bytes(gguf_bytes(keys, {}))
    assert GGUFReader(tmp_path).generation_config() == {
        "eos_token_id": [2, 300, len(pieces()) - 3], "temperature": 0.6, "top_k": 20.0,
    }  # fmt: skip
