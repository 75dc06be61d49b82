"""Ask the demo model what was held back from its training: ``python -m kvpage.demo.evaluate [DIR]``.

An answer counts only if it is the expected text to the letter and ended by the end token. The answers come
from :class:`kvpage.Engine`, or with ``--oracle`` from transformers.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from tokenizers import Tokenizer

from kvpage.demo import path
from kvpage.demo.arithmetic import table_problems
from kvpage.demo.corpus import BOS, END, PAD, ROLES, Example, held_back, render_turn

__all__ = ["GOALS", "Generate", "Reply", "engine_generate", "main", "oracle_generate", "score", "wrong"]

GOALS = {"arithmetic": 0.95, "factual": 0.90}
_MAX_TOKENS = 128
_BATCH = 40


@dataclass(frozen=True)
class Reply:
    """The text of an answer without its end token, and whether the end token ended it."""

    text: str
    ended: bool


Generate: TypeAlias = Callable[[Sequence[str]], list[Reply]]
"""Answers questions greedily, each as the first message of a chat of its own; order is kept."""


def _prompt_ids(tokenizer: Tokenizer, question: str) -> list[int]:
    text = BOS + render_turn("user", question) + ROLES["assistant"]
    return list(tokenizer.encode(text, add_special_tokens=False).ids)


def engine_generate(folder: Path, dtype: str, **options: Any) -> Generate:
    """Return a function that answers through :class:`kvpage.Engine`, made with ``options``."""
    from kvpage import Engine, SamplingParams

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    params = SamplingParams(temperature=0.0, max_tokens=_MAX_TOKENS)

    def generate(questions: Sequence[str]) -> list[Reply]:
        prompts = [{"prompt_token_ids": _prompt_ids(tokenizer, question)} for question in questions]
        with Engine(str(folder), dtype=dtype, **options) as engine:
            choices = [output.outputs[0] for output in engine.generate(prompts, params)]
        return [Reply(choice.text, choice.finish_reason == "stop") for choice in choices]

    return generate


def oracle_generate(folder: Path, dtype: str) -> Generate:
    """Return a function that answers through transformers."""
    import torch
    from transformers import LlamaForCausalLM

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    pad, end = tokenizer.token_to_id(PAD), tokenizer.token_to_id(END)
    model: Any = LlamaForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))

    def answer(questions: Sequence[str]) -> list[Reply]:
        prompts = [_prompt_ids(tokenizer, question) for question in questions]
        width = max(map(len, prompts))
        ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        output = model.generate(
            input_ids=ids, attention_mask=mask, do_sample=False, temperature=None, max_new_tokens=_MAX_TOKENS
        )
        replies = []
        for row in output[:, width:].tolist():
            length = row.index(end) if end in row else len(row)
            replies.append(Reply(tokenizer.decode(row[:length]), end in row))
        return replies

    def generate(questions: Sequence[str]) -> list[Reply]:
        starts = range(0, len(questions), _BATCH)
        return [reply for start in starts for reply in answer(questions[start : start + _BATCH])]

    return generate


def wrong(examples: Sequence[Example], generate: Generate) -> list[tuple[Example, Reply]]:
    """Return the examples that were not answered exactly, each with what was answered."""
    replies = generate([example.question for example in examples])
    pairs = zip(examples, replies, strict=True)
    return [(example, reply) for example, reply in pairs if reply != Reply(example.answer, True)]


def score(
    examples: Sequence[Example], mistakes: Sequence[tuple[Example, Reply]]
) -> dict[str, tuple[int, int]]:
    """Return for each kind of example how many were answered exactly, and how many there are."""
    asked = Counter(example.kind for example in examples)
    missed = Counter(example.kind for example, _ in mistakes)
    return {kind: (count - missed[kind], count) for kind, count in asked.items()}


def _report(folder: Path, dtype: str, arguments: argparse.Namespace) -> bool:
    """Print the figures of one dtype; return whether the goals are met."""
    examples = held_back(arguments.count, arguments.seed)
    examples += [Example("table", f"What is {p.a} times {p.b}?", p.answer) for p in table_problems()]
    generate = (oracle_generate if arguments.oracle else engine_generate)(folder, dtype)
    mistakes = wrong(examples, generate)
    met = True
    for kind, (right, count) in score(examples, mistakes).items():
        goal = GOALS.get(kind)
        met = met and (goal is None or right >= goal * count)
        note = "learned by heart" if goal is None else f"held back, goal {goal:.0%}"
        print(f"{dtype:9s} {kind:10s} {right:4d} of {count:4d}  {right / count:6.1%}  ({note})")
    if arguments.show:
        for example, reply in mistakes:
            print(f"  {example.question}\n    expected {example.answer}\n    answered {reply.text}")
    return met


def main() -> int:
    """Read the command line, print the figures, return 1 if a goal is missed."""
    parser = argparse.ArgumentParser(prog="python -m kvpage.demo.evaluate", description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?", default=path(), help="default: the bundled model")
    parser.add_argument("--oracle", action="store_true", help="answer through transformers")
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"], help="default: %(default)s")
    parser.add_argument("--count", type=int, default=200, help="held-back questions (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="which questions (default: %(default)s)")
    parser.add_argument("--show", action="store_true", help="print the wrong answers")
    arguments = parser.parse_args()
    return 0 if all([_report(arguments.folder, dtype, arguments) for dtype in arguments.dtype]) else 1


if __name__ == "__main__":
    sys.exit(main())
