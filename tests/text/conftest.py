"""Tiny tokenizers of every kind, made here from a few sentences."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

SENTENCES = [
    "The block pool hands out blocks, and the prefix index finds them again.",
    "Paged attention reads keys and values through a block table of each sequence.",
    "Grüße aus Köln, naïve café; 你好世界。 こんにちは世界 한국어 emoji 😀😃 👩‍👩‍👧 é",
    "def push(self, token_ids):\n    return ''.join(pieces)\n\n\t# 12345 + 67890 = 80235",
] * 4
SPECIALS = ["<unk>", "<s>", "</s>"]


def byte_level() -> Tokenizer:
    """GPT-2 / Llama 3 / Qwen style, with special and ordinary added tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        SENTENCES, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    )
    tokenizer.add_special_tokens(["<s>", "</s>", "<|im_start|>", "<é>"])
    tokenizer.add_tokens([AddedToken("<think>", normalized=False), AddedToken("日本", normalized=False)])
    begin = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", begin)])
    return tokenizer


def _byte_fallback(with_prefix: bool) -> Tokenizer:
    """A BPE over characters whose other characters fall back to bytes, as SentencePiece makes them."""
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    ascii_only = [sentence.encode("ascii", "ignore").decode() for sentence in SENTENCES]
    trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=SPECIALS, show_progress=False)
    trained.train_from_iterator(ascii_only, trainer)
    learned = sorted(trained.get_vocab(), key=trained.token_to_id)
    tokens = [*SPECIALS, *(f"<0x{byte:02X}>" for byte in range(256)), *learned[len(SPECIALS) :], "世"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    merges = [
        (token[:cut], token[cut:])
        for token in learned[len(SPECIALS) :]
        for cut in range(1, len(token))
        if token[:cut] in vocabulary and token[cut:] in vocabulary
    ]
    model = models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    tokenizer = Tokenizer(model)
    tokenizer.add_special_tokens(SPECIALS)
    stages = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*stages, decoders.Strip(" ", 1, 0)] if with_prefix else stages)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def llama2() -> Tokenizer:
    """Llama 2 as its tokenizer.json has it: a normalizer that prepends a space, byte fallback, strip."""
    tokenizer = _byte_fallback(with_prefix=True)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return tokenizer


def llama2_metaspace() -> Tokenizer:
    """Llama 2 as transformers 5 writes it: Metaspace before the first word only."""
    tokenizer = _byte_fallback(with_prefix=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    return tokenizer


def gemma() -> Tokenizer:
    """Byte fallback without a space before the first word."""
    tokenizer = _byte_fallback(with_prefix=False)
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    return tokenizer


def unigram() -> Tokenizer:
    """A unigram model with the Metaspace decoder (T5 style)."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=300, special_tokens=SPECIALS, unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return tokenizer


def wordpiece() -> Tokenizer:
    """WordPiece with its clean-up (BERT style)."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=SPECIALS, show_progress=False)
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return tokenizer


def words() -> Tokenizer:
    """Words without a decoder: a space goes between tokens."""
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.WordLevelTrainer(vocab_size=100, special_tokens=SPECIALS, show_progress=False)
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return tokenizer


def suffixed() -> Tokenizer:
    """BPE with </w> at the end of words, whose last token decodes differently: no pieces, the window is used."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.BPEDecoder()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=SPECIALS, end_of_word_suffix="</w>", show_progress=False
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return tokenizer


KINDS: dict[str, Callable[[], Tokenizer]] = {
    maker.__name__: maker
    for maker in (byte_level, llama2, llama2_metaspace, gemma, unigram, wordpiece, words, suffixed)
}


@pytest.fixture(scope="session")
def backends() -> dict[str, Tokenizer]:
    """One tokenizer of each kind, by name. Shared: tests must not change them."""
    return {name: make() for name, make in KINDS.items()}


@pytest.fixture(params=list(KINDS))
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def backend(backends: dict[str, Tokenizer], kind: str) -> Tokenizer:
    """A tokenizer of each kind in turn."""
    return backends[kind]
