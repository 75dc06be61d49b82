"""The tokens that activations are taken from: a file's, the bundled model's own text, or what a model says itself."""

from __future__ import annotations

import itertools
import json
import logging
import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from kvpage import ConfigError, Engine, KvpageError, SamplingParams
from kvpage.text.tokenizer import Tokenizer, load_tokenizer
from kvpage_quantize.settings import CalibrationSettings
from kvpage_quantize.source import Source

LOG = logging.getLogger("kvpage.quantize")
USUAL_LENGTH = 512
FEWEST_TOKENS = 16
"""Less text than this says nothing about activations."""

SHORTEST_STORY = 32
"""Most models end a text that begins with any token soon; shorter ones than this are drawn on."""


def calibration_tokens(source: Source, settings: CalibrationSettings) -> list[list[int]]:
    """Sequences of token ids, all equally long: at most ``settings.samples``, fewer where a file holds less text.

    Raises:
        ConfigError: the length is beyond the model's context.
        KvpageError: the file cannot be read, holds too little text, or there is no tokenizer to read it with.
    """
    length = settings.length or min(USUAL_LENGTH, source.context)
    if length > source.context:
        raise ConfigError(
            f"--sequence-length {length} is beyond the model's context of {source.context} tokens: give at most that"
        )
    wanted = settings.samples * length
    stream = list(itertools.islice(_tokens(source, settings, length), wanted))
    if len(stream) < FEWEST_TOKENS:
        raise KvpageError(
            f"--calibration {settings.file} holds {len(stream)} tokens, at least {FEWEST_TOKENS} are needed and "
            f"{wanted} were asked for: give more text, or leave the flag out"
        )
    length = min(length, len(stream))
    blocks = [stream[at : at + length] for at in range(0, len(stream) - length + 1, length)]
    if len(blocks) < settings.samples:
        LOG.info(
            "calibration text: %d sequences of %d tokens, %d were asked for",
            len(blocks),
            length,
            settings.samples,
        )
    highest = max(map(max, blocks))
    if highest >= source.spec.vocab_size:
        raise KvpageError(
            f"{source.folder}: the tokenizer gives token {highest}, the model has {source.spec.vocab_size}: "
            "tokenizer and weights are not of one model"
        )
    return blocks


def read_documents(path: Path) -> list[str]:
    """The documents of a file: the "text" of each line of a .jsonl, or blocks between blank lines of any other.

    Raises:
        KvpageError: it cannot be read, or a line is not such an object.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise KvpageError(f"--calibration {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise KvpageError(
            f"--calibration {path} is not UTF-8 text ({error}): give text, or .jsonl"
        ) from error
    if path.suffix == ".jsonl":
        lines = enumerate(text.splitlines(), 1)
        found = [_text_of(path, number, line) for number, line in lines if line.strip()]
    else:
        blocks = itertools.groupby(text.splitlines(), key=lambda line: bool(line.strip()))
        found = ["\n".join(lines) for filled, lines in blocks if filled]
    return [document for document in found if document.strip()]


def _text_of(path: Path, number: int, line: str) -> str:
    try:
        value: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise KvpageError(f"--calibration {path}, line {number} is not JSON: {error}") from error
    text = value.get("text") if isinstance(value, dict) else None
    if not isinstance(text, str):
        raise KvpageError(
            f'--calibration {path}, line {number}: expected an object with a "text", found {line:.60}'
        )
    return text


def _tokens(source: Source, settings: CalibrationSettings, length: int) -> Iterator[int]:
    """Documents one after another."""
    from kvpage import demo  # package data

    if settings.file is not None:
        documents = read_documents(settings.file)
        random.Random(settings.seed).shuffle(documents)
        return _encoded(_tokenizer(source), documents)
    if source.folder.resolve() == demo.path():
        from kvpage.demo import corpus  # what it was trained on

        return _encoded(
            _tokenizer(source),
            ("".join(segment.text for segment in document) for document in corpus.documents(settings.seed)),
            add_special_tokens=False,
        )
    return itertools.chain.from_iterable(_stories(source, settings, length))


def _tokenizer(source: Source) -> Tokenizer:
    tokenizer: Tokenizer = load_tokenizer(source.folder)
    return tokenizer


def _encoded(
    tokenizer: Tokenizer, documents: Iterable[str], *, add_special_tokens: bool = True
) -> Iterator[int]:
    for document in documents:
        yield from tokenizer.encode(document, add_special_tokens=add_special_tokens)


def _stories(source: Source, settings: CalibrationSettings, length: int) -> Iterator[list[int]]:
    """What the model says after its first token and one drawn at random (as LLM-QAT does, arXiv:2305.17888)."""
    LOG.info("calibration text: %d sequences of %d tokens by the model itself", settings.samples, length)
    draw = random.Random(settings.seed)
    start = source.config.get("bos_token_id")
    opening = [start] if isinstance(start, int) else []
    with Engine(
        str(source.folder), max_model_len=min(source.context, max(length, SHORTEST_STORY) + 1)
    ) as engine:
        missing = settings.samples * length
        while missing > 0:
            count = -(-missing // length)
            prompts = [[*opening, draw.randrange(source.spec.vocab_size)] for _ in range(count)]
            params = [
                SamplingParams(
                    temperature=1.0,
                    max_tokens=length - len(prompts[0]),
                    min_tokens=min(SHORTEST_STORY, length - len(prompts[0])),
                    seed=draw.getrandbits(63),
                    detokenize=False,
                )
                for _ in prompts
            ]
            for prompt, output in zip(prompts, engine.generate(prompts, params), strict=True):
                story = [*prompt, *output.outputs[0].token_ids]
                missing -= len(story)
                yield story
