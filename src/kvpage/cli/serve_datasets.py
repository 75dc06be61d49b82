"""The prompts of ``kvpage bench serve``: vLLM's data sets by its names, made or read here, never downloaded."""

from __future__ import annotations

import argparse
import json
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from kvpage.cli.serve_load import Sample
from kvpage.flags.parser import UsageError

DATASETS = ("random", "sharegpt", "custom", "prefix_repetition")
NOT_HERE: Mapping[str, str] = {
    "sonnet": "the poem comes with vLLM's sources; --dataset-name prefix_repetition also shares prefixes, or put "
    "the lines into a .jsonl file for --dataset-name custom",
    "hf": "nothing is downloaded; put the prompts into a .jsonl file for --dataset-name custom",
    "random-mm": "text only is served", "custom_image": "text only is served", "custom_audio": "text only is served",
}  # fmt: skip
"""vLLM's data sets that are refused -> why, and what instead."""
ATTEMPTS = 10
POOL = 8192
"""Tokens that are tried for random prompts."""
SHORTEST, LONGEST_PROMPT, LONGEST_TOTAL = 4, 1024, 2048
"""Tokens: which conversations of ShareGPT are taken; vLLM's bounds."""


class TextTokenizer(Protocol):
    """What prompts are made with."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def all_special_ids(self) -> frozenset[int]: ...
    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]: ...
    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str: ...


class Words:
    """Stands in where there is no tokenizer: every number is a word, and a word counts as a token."""

    vocab_size = 1000
    all_special_ids: frozenset[int] = frozenset()

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Its words."""
        return [sum(word.encode()) % self.vocab_size for word in text.split()]

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """A text of so many words."""
        return " ".join(f"w{number}" for number in ids)


def make_samples(namespace: argparse.Namespace, tokenizer: TextTokenizer, chat_text: Callable[[str], str]) -> list[Sample]:  # fmt: skip
    """The prompts that the command line asks for.

    ``chat_text`` writes a question out as the model's chat template has it.

    Raises:
        UsageError: the data set is not offered, its file cannot be used, or a length makes no sense.
    """
    numbers = random.Random(namespace.seed)
    name = namespace.dataset_name
    if name == "random":
        return random_samples(namespace, tokenizer, numbers)
    if name == "prefix_repetition":
        return prefix_repetition_samples(namespace, tokenizer, numbers)
    if namespace.dataset_path is None:
        raise UsageError(f"--dataset-name {name} reads a file: name it with --dataset-path FILE")
    if name == "sharegpt":
        found = sharegpt_samples(namespace, tokenizer, numbers)
    else:
        found = custom_samples(namespace, tokenizer, numbers, chat_text)
    if not found:
        raise UsageError(
            f"{namespace.dataset_path} holds no prompt that can be used for --dataset-name {name}"
        )
    if not namespace.no_oversample:
        found += [numbers.choice(found) for _ in range(namespace.num_prompts - len(found))]
    return found


def random_samples(
    namespace: argparse.Namespace, tokenizer: TextTokenizer, numbers: random.Random
) -> list[Sample]:
    """Runs of consecutive tokens from a random start, after a prefix that all share."""
    allowed = _plain_tokens(tokenizer, numbers)
    special = len(tokenizer.encode("")) if not isinstance(tokenizer, Words) else 0
    length = max(0, namespace.random_input_len - special)
    ratio = namespace.random_range_ratio
    if math.floor(length * (1 - ratio)) + namespace.random_prefix_len < 1:
        raise UsageError(
            f"--random-input-len {namespace.random_input_len} leaves prompts without a token: the tokenizer adds "
            f"{special} of its own; take more, or a --random-prefix-len"
        )
    prefix = _exact(tokenizer, allowed, namespace.random_prefix_len, numbers)
    samples = []
    for index in range(namespace.num_prompts):
        own, start = _around(length, ratio, numbers), numbers.randrange(len(allowed))
        ids = [*prefix, *(allowed[(start + index + place) % len(allowed)] for place in range(own))]
        text, count = _text_of_length(tokenizer, ids, allowed, numbers)
        output = max(1, _around(namespace.random_output_len, ratio, numbers))
        samples.append(Sample(prompt=text, prompt_len=count, output_len=output))
    return samples


def prefix_repetition_samples(
    namespace: argparse.Namespace, tokenizer: TextTokenizer, numbers: random.Random
) -> list[Sample]:
    """Several prefixes, each with as many random endings; shuffled."""
    prefixes = namespace.prefix_repetition_num_prefixes
    if namespace.num_prompts < prefixes:
        raise UsageError(
            f"--num-prompts {namespace.num_prompts} is below --prefix-repetition-num-prefixes {prefixes}: take more "
            "prompts or fewer prefixes"
        )
    allowed = _plain_tokens(tokenizer, numbers)
    samples = []
    for _ in range(prefixes):
        prefix = _exact(tokenizer, allowed, namespace.prefix_repetition_prefix_len, numbers)
        for _ in range(namespace.num_prompts // prefixes):
            suffix = _exact(tokenizer, allowed, namespace.prefix_repetition_suffix_len, numbers)
            samples.append(
                Sample(
                    prompt=tokenizer.decode([*prefix, *suffix], skip_special_tokens=False),
                    prompt_len=len(prefix) + len(suffix),
                    output_len=namespace.prefix_repetition_output_len,
                )
            )
    if not namespace.disable_shuffle:
        numbers.shuffle(samples)
    return samples


def sharegpt_samples(
    namespace: argparse.Namespace, tokenizer: TextTokenizer, numbers: random.Random
) -> list[Sample]:
    """First question and first answer of each conversation of a ShareGPT file."""
    path = namespace.dataset_path
    try:
        data = json.loads(_read(path))
        pairs = [
            (str(entry["conversations"][0]["value"]), str(entry["conversations"][1]["value"]))
            for entry in data
            if len(entry.get("conversations", ())) >= 2
        ]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UsageError(
            f'{path} is no ShareGPT file: a JSON list of {{"conversations": [{{"value": ...}}, ...]}}'
        ) from None
    if not namespace.disable_shuffle:
        numbers.shuffle(pairs)
    samples: list[Sample] = []
    for question, answer in pairs:
        if len(samples) == namespace.num_prompts:
            break
        length, asked = len(tokenizer.encode(question)), namespace.sharegpt_output_len
        output = len(tokenizer.encode(answer)) if asked is None else asked
        short = length < SHORTEST or (asked is None and output < SHORTEST)
        if not short and length <= LONGEST_PROMPT and length + output <= LONGEST_TOTAL:
            samples.append(replace(Sample(prompt=question, prompt_len=length, output_len=output)))
    return samples


def custom_samples(
    namespace: argparse.Namespace,
    tokenizer: TextTokenizer,
    numbers: random.Random,
    chat_text: Callable[[str], str],
) -> list[Sample]:
    """A .jsonl file with a "prompt" a line, and "output_tokens" where --custom-output-len is -1."""
    rows = [
        _custom_row(namespace.dataset_path, number, line)
        for number, line in enumerate(_read(namespace.dataset_path).splitlines(), 1)
        if line.strip()
    ]
    if not namespace.disable_shuffle:
        numbers.shuffle(rows)
    samples = []
    for row in rows[: namespace.num_prompts]:
        output = namespace.custom_output_len
        if output == -1:
            output = row.get("output_tokens")
            if isinstance(output, bool) or not isinstance(output, int) or output < 1:
                raise UsageError(
                    f'--custom-output-len -1 takes each line\'s "output_tokens", which is {output!r} for the prompt '
                    f"{row['prompt'][:40]!r}"
                )
        prompt = row["prompt"] if namespace.skip_chat_template else chat_text(row["prompt"])
        samples.append(Sample(prompt=prompt, prompt_len=len(tokenizer.encode(prompt)), output_len=output))
    return samples


def _custom_row(path: str, number: int, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
        if isinstance(row["prompt"], str):
            return dict(row)
    except (ValueError, KeyError, TypeError):
        pass
    raise UsageError(f'{path}, line {number}: must be a JSON object with a "prompt" that is text')


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UsageError(f"--dataset-path {path}: cannot be read: {reason}") from None


def _plain_tokens(tokenizer: TextTokenizer, numbers: random.Random) -> list[int]:
    """Tokens that prompts are made of: none that is special, or part of a character only and so never read again."""
    pool = numbers.sample(range(tokenizer.vocab_size), min(tokenizer.vocab_size, POOL))
    found = [
        token
        for token in sorted(pool)
        if token not in tokenizer.all_special_ids and "\ufffd" not in tokenizer.decode([token])
    ]
    if not found:
        raise UsageError(
            "the tokenizer has no tokens to make random prompts of: name another with --tokenizer"
        )
    return found


def _around(length: int, ratio: float, numbers: random.Random) -> int:
    return numbers.randint(math.floor(length * (1 - ratio)), math.ceil(length * (1 + ratio)))


def _exact(
    tokenizer: TextTokenizer, allowed: Sequence[int], length: int, numbers: random.Random
) -> list[int]:
    """Random tokens whose text encodes to so many again."""
    text, _ = _text_of_length(tokenizer, [numbers.choice(allowed) for _ in range(length)], allowed, numbers)
    return tokenizer.encode(text, add_special_tokens=False)


def _text_of_length(
    tokenizer: TextTokenizer, ids: Sequence[int], allowed: Sequence[int], numbers: random.Random
) -> tuple[str, int]:
    """A text that encodes to as many tokens as ``ids`` are, or nearly: two tokens may read as one, or as three."""
    length, current = len(ids), list(ids)
    text = tokenizer.decode(current, skip_special_tokens=False)
    for _ in range(ATTEMPTS):
        current = tokenizer.encode(text, add_special_tokens=False)
        if len(current) == length:
            break
        current = [*current, *(numbers.choice(allowed) for _ in range(length - len(current)))][:length]
        text = tokenizer.decode(current, skip_special_tokens=False)
    return text, len(tokenizer.encode(text, add_special_tokens=False))
