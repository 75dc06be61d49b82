"""The text that the demo model is trained on, and the questions that are held back from it."""

from __future__ import annotations

import random
import re
from itertools import islice

import pytest

from kvpage.demo import arithmetic
from kvpage.demo.corpus import Segment, document, documents, held_back
from kvpage.demo.facts import load_facts
from kvpage.demo.impressions import other_words
from kvpage.demo.phrasing import TEMPLATES, held_back_templates, normalise, questions, training_templates


@pytest.fixture(
    scope="module", params=[(0.0, 20_000), (0.45, 40_000)], ids=["usual mixture", "with first impressions"]
)
def training_lines(request: pytest.FixtureRequest) -> list[str]:
    """Every turn, and every line of plain text, of a large sample of training documents."""
    impressions, count = request.param
    drawn_documents = islice(documents(20, 0.05, impressions), count)
    texts = ("".join(segment.text for segment in drawn) for drawn in drawn_documents)
    return [line for text in texts for line in re.split(r"<\|\w+\|>|\n|Question: |Answer: ", text) if line]


def test_a_seed_fixes_the_documents() -> None:
    first, second = list(islice(documents(3), 200)), list(islice(documents(3), 200))
    assert first == second
    assert first != list(islice(documents(4), 200))


def test_held_back_questions_never_occur_in_the_training_text(training_lines: list[str]) -> None:
    asked = {normalise(line) for line in training_lines}
    for seed in range(3):
        examples = [example for example in held_back(200, seed) if example.kind == "factual"]
        assert [example.question for example in examples if normalise(example.question) in asked] == []


def test_held_back_operands_never_meet_in_the_training_text(training_lines: list[str]) -> None:
    shown: dict[str, set[tuple[int, int]]] = {"+": set(), "-": set()}
    for line in training_lines:
        # Every answer repeats its problem. Sums of three numbers are refused, not solved, and left out here.
        for a, operator, b in re.findall(r"(?<![+-] )\b(\d{2}) ([+-]) (\d{2})\b(?! [+-])", line):
            shown[operator].add((min(int(a), int(b)), max(int(a), int(b))))
    all_pairs = 90 * 91 // 2
    for operator, pairs in shown.items():
        held_pairs = arithmetic.held_back_pairs(operator)
        assert len(held_pairs) > 0.09 * all_pairs
        assert pairs.isdisjoint(held_pairs)
        # The sample is large enough to mean something: most of what may be shown was shown.
        assert len(pairs) > 0.8 * (all_pairs - len(held_pairs))


def test_every_fact_keeps_templates_for_training_and_two_held_back() -> None:
    for fact in load_facts():
        held, taught = set(held_back_templates(fact)), set(training_templates(fact))
        assert held | taught == set(TEMPLATES[fact.kind])
        assert held.isdisjoint(taught)
        assert len(held) == (0 if fact.kind == "say" else 2)


def test_one_question_has_one_answer_and_one_template() -> None:
    seen: dict[str, tuple[str, str]] = {}
    for fact in load_facts():
        for template in TEMPLATES[fact.kind]:
            for question in questions(fact, (template,)):
                owner = (fact.answer, "" if fact.kind == "say" else template)
                assert seen.setdefault(normalise(question), owner) == owner, question


def test_first_impressions_ask_nothing_that_is_held_back_or_answered_otherwise() -> None:
    taught = {}
    for fact in load_facts():
        held = {normalise(question) for question in questions(fact, held_back_templates(fact))}
        assert [question for question, _ in other_words() if normalise(question) in held] == []
        taught.update(
            {normalise(question): fact.answer for question in questions(fact, training_templates(fact))}
        )
    for question, answer in other_words():
        assert taught.setdefault(normalise(question), answer) == answer, question


def test_there_are_enough_facts_and_their_answers_are_prose() -> None:
    facts = load_facts()
    assert len(facts) >= 100
    for fact in facts:
        assert fact.answer.isascii()
        assert fact.answer[-1] in ".!?"
        assert len(fact.answer) <= 250


def test_the_evaluation_set_is_half_arithmetic_and_has_no_question_twice() -> None:
    examples = held_back(200)
    assert len({normalise(example.question) for example in examples if example.kind == "factual"}) == 100
    assert len({example.answer for example in examples if example.kind == "arithmetic"}) == 100


@pytest.mark.parametrize(("a", "operator", "b", "answer"), [
    (47, "+", 38, "47 + 38 = 77 + 8 = 85."), (47, "+", 30, "47 + 30 = 77."), (85, "-", 38, "85 - 38 = 55 - 8 = 47."),
    (38, "-", 85, "38 - 85 = -(85 - 38) = -(55 - 8) = -47."), (12, "*", 12, "12 * 12 = 144."),
])  # fmt: skip
def test_the_answer_to_a_problem_repeats_it_and_shows_the_steps(
    a: int, operator: str, b: int, answer: str
) -> None:
    assert arithmetic.Problem(a, operator, b).answer == answer


def test_every_equation_in_the_training_text_is_true(training_lines: list[str]) -> None:
    chains = {line for line in training_lines if re.fullmatch(r"[-+*() =\d]+ = -?\d+\.", line)}
    assert len(chains) > 5_000
    for chain in chains:
        values = {eval(side, {"__builtins__": {}}) for side in chain.rstrip(".").split(" = ")}
        assert len(values) == 1, chain


def test_only_answers_carry_weight_in_chats() -> None:
    random_ = random.Random(5)
    chats = [drawn for drawn in (document(random_) for _ in range(200)) if "<|user|>" in _text(drawn)]
    assert chats
    for drawn in chats:
        assert all(not segment.text.startswith("<|user|>") for segment in drawn if segment.weight)
        assert all(segment.text.endswith("<|end|>") for segment in drawn if segment.weight)


def _text(drawn: list[Segment]) -> str:
    return "".join(segment.text for segment in drawn)
