"""The training text of the demo model and the questions that are held back from it.

Everything is generated from a seed: chats about the facts, sums, honest answers to what the model can not
know, and the same facts as plain prose, for prompts that are continued without a chat template.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from kvpage.demo import arithmetic
from kvpage.demo.facts import Fact, load_facts
from kvpage.demo.impressions import first_opening, first_turn
from kvpage.demo.outside import RAW_OPENERS, outside
from kvpage.demo.phrasing import TEMPLATES, held_back_templates, questions, training_templates

__all__ = [
    "BOS", "END", "PAD", "ROLES", "Example", "Segment", "document", "documents", "held_back", "render_turn",
]  # fmt: skip

PAD = "<|pad|>"
BOS = "<|bos|>"
END = "<|end|>"
ROLES = {"system": "<|system|>", "user": "<|user|>", "assistant": "<|assistant|>"}

_SYSTEM_PROMPTS = (
    "You are a helpful assistant.", "You are a helpful assistant that answers briefly.",
    "You are the kvpage demo model.", "Answer in one or two sentences.", "You are a friendly chatbot.",
    "You are an expert on LLM serving.", "Be concise.", "You are a helpful AI assistant.",
    "You answer questions about kvpage.", "Be polite and precise.",
)  # fmt: skip
# None of these may turn one question template into another, or a held-back question would be trained on.
_BEFORE = ("Hey, ", "OK. ", "Good morning. ", "Sorry, ", "Next: ", "I have a question. ", "Hi there! ")
_AFTER = (" Please.", " Thanks!", " Keep it short.", " In simple terms.", " Please be brief.")


@dataclass(frozen=True)
class Segment:
    """A piece of a document and the weight of its tokens in the loss.

    Segments are tokenized one by one, so they end where the tokenizer splits anyway: at a special token,
    before a newline or between a word and the space that follows it.
    """

    text: str
    weight: float


@dataclass(frozen=True)
class Example:
    """A held-back question with its only correct answer; ``kind`` is "arithmetic" or "factual"."""

    kind: str
    question: str
    answer: str


def render_turn(role: str, content: str) -> str:
    """Return one message as the chat template writes it."""
    return f"{ROLES[role]}{content}{END}"


def _loosen(random_: random.Random, question: str) -> str:
    """Return the question as people type it: in a hurry, or with a few words around it."""
    if random_.random() < 0.1:
        question = random_.choice(_BEFORE) + question
    if random_.random() < 0.2:
        question = question.rstrip("?.!") or question
    elif random_.random() < 0.1:
        question += random_.choice(_AFTER)
    if random_.random() < 0.2:
        question = question.lower()
    return question


def _ask_fact(random_: random.Random, fact: Fact) -> tuple[str, str]:
    template = random_.choice(training_templates(fact))
    name = random_.choice(fact.names)
    question = questions(Fact(fact.kind, (name,), fact.answer), (template,))[0]
    return question if fact.kind == "say" else _loosen(random_, question), fact.answer


def _ask_problem(random_: random.Random) -> tuple[str, str]:
    problem = arithmetic.draw(random_)
    return _loosen(random_, arithmetic.phrase(random_, problem)), problem.answer


def _follow_ups(fact: Fact) -> list[Fact]:
    return [
        other for other in load_facts()
        if other.kind in ("why", "how") and other.kind != fact.kind and other.names[0] == fact.names[0]
    ]  # fmt: skip


def _turns(random_: random.Random, count: int) -> Iterator[tuple[str, str]]:
    """Yield questions and answers on mixed subjects; some ask on with "it" about the fact before."""
    facts = load_facts()
    while count > 0:
        count -= 1
        draw = random_.random()
        if draw < 0.25:
            yield _ask_problem(random_)
        elif draw < 0.35:
            yield outside(random_)
        else:
            fact = random_.choice(facts)
            yield _ask_fact(random_, fact)
            follow_ups = _follow_ups(fact) if fact.kind == "define" else []
            if follow_ups and random_.random() < 0.5:
                other = random_.choice(follow_ups)
                text = random_.choice(TEMPLATES[other.kind]).format(x="it")
                yield random_.choice((text, "And " + text[0].lower() + text[1:])), other.answer


def _chat(random_: random.Random, turns: Iterator[tuple[str, str]]) -> list[Segment]:
    segments = [Segment(BOS, 0.0)]
    if random_.random() < 0.2:
        segments.append(Segment(render_turn("system", random_.choice(_SYSTEM_PROMPTS)), 0.0))
    for question, answer in turns:
        segments.append(Segment(render_turn("user", question) + ROLES["assistant"], 0.0))
        segments.append(Segment(answer + END, 1.0))
    return segments


def _sheet(
    random_: random.Random, count: int, draw: Callable[[random.Random], arithmetic.Problem] = arithmetic.draw
) -> list[Segment]:
    """A page of ``count`` solved problems as plain text, so that "12 + 30 =" can be continued."""
    segments = [Segment(BOS, 0.0)]
    for index in range(count):
        problem = draw(random_)
        segments += [Segment("\n" * (index > 0) + problem.left, 0.0), Segment(f" {problem.right}.", 1.0)]
    return [*segments, Segment(END, 1.0)]


def _prose(random_: random.Random) -> list[Segment]:
    """One to three neighbouring facts as a paragraph, or one of the openers that people try first."""
    if random_.random() < 0.15:
        opener, ending = random_.choice(RAW_OPENERS)
        return [Segment(BOS, 0.0), Segment(opener, 0.0), Segment(ending + END, 1.0)]
    facts = [fact for fact in load_facts() if fact.kind not in ("ask", "say", "can")]
    start = random_.randrange(len(facts))
    chosen = facts[start : start + random_.choice((1, 1, 2, 3))]
    return [Segment(BOS, 0.0), Segment(" ".join(fact.answer for fact in chosen) + END, 1.0)]


def _raw_question(random_: random.Random) -> list[Segment]:
    """A question as plain text and its answer on the next line."""
    question, answer = _ask_fact(random_, random_.choice(load_facts()))
    if random_.random() < 0.3:
        question, answer = outside(random_)
    if random_.random() < 0.4:
        question, answer = f"Question: {question}", f"Answer: {answer}"
    return [Segment(BOS, 0.0), Segment(question, 0.0), Segment("\n" + answer + END, 1.0)]


def _first_impression(random_: random.Random) -> list[Segment]:
    """What is tried first: a chat of a few plain turns, the opening of a plain text, or a page of close sums."""
    kind = random_.random()
    if kind < 0.12:
        return _sheet(random_, 10, arithmetic.draw_close)
    if kind < 0.36:
        opener, ending = first_opening(random_)
        return [Segment(BOS, 0.0), Segment(opener, 0.0), Segment(ending + END, 1.0)]
    count = random_.choice((1, 1, 1, 2, 3))
    return _chat(random_, iter([first_turn(random_) for _ in range(count)]))


def document(random_: random.Random, sheets: float = 0.0, impressions: float = 0.0) -> list[Segment]:
    """Draw one training document from the usual mixture, but for two shares.

    ``impressions`` is the share of :mod:`kvpage.demo.impressions`; of the rest, ``sheets`` is the share of long
    pages of sums.
    """
    if impressions and random_.random() < impressions:
        return _first_impression(random_)
    if random_.random() < sheets:
        return _sheet(random_, 12)
    draw = random_.random()
    if draw < 0.30:
        return _chat(random_, iter([_ask_fact(random_, random_.choice(load_facts()))]))
    if draw < 0.72:
        count = random_.randint(1, 4)
        return _chat(random_, iter([_ask_problem(random_) for _ in range(count)]))
    if draw < 0.80:
        return _chat(random_, iter([outside(random_)]))
    if draw < 0.88:
        return _chat(random_, _turns(random_, random_.randint(2, 5)))
    if draw < 0.91:
        return _sheet(random_, random_.choice((1, 1, 4)))
    return _prose(random_) if draw < 0.96 else _raw_question(random_)


def documents(seed: int, sheets: float = 0.0, impressions: float = 0.0) -> Iterator[list[Segment]]:
    """Yield training documents without end; the same arguments yield the same documents."""
    random_ = random.Random(seed)
    while True:
        yield document(random_, sheets, impressions)


def held_back(count: int = 200, seed: int = 0) -> list[Example]:
    """Return ``count`` questions that training never shows: half arithmetic, half factual.

    Arithmetic: as many sums as differences, each of a held-back pair. Factual: facts are drawn without
    repetition until all had their turn, each asked with one of its held-back templates.
    """
    random_ = random.Random(f"held back {seed}")
    quarter = count // 4
    problems = arithmetic.held_back_problems("+", quarter, seed)
    problems += arithmetic.held_back_problems("-", quarter, seed)
    examples = [Example("arithmetic", arithmetic.phrase(random_, it), it.answer) for it in problems]
    pool: list[Fact] = []
    while len(examples) < count:
        if not pool:
            pool = [fact for fact in load_facts() if held_back_templates(fact)]
            random_.shuffle(pool)
        fact = pool.pop()
        question = random_.choice(questions(fact, held_back_templates(fact)))
        examples.append(Example("factual", question, fact.answer))
    return examples
