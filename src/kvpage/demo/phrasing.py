"""How a fact is asked for, and which ways of asking are held back from training.

A question is a template filled with a name. The unit that is held back is a (fact, template) pair: with
every name of the fact and in every spelling that :func:`normalise` makes equal. The model sees the
template with other facts and the fact with other templates, never the two together.
"""

from __future__ import annotations

import random
import re

from kvpage.demo.facts import Fact

__all__ = ["TEMPLATES", "held_back_templates", "normalise", "questions", "training_templates"]

TEMPLATES: dict[str, tuple[str, ...]] = {
    "define": (
        "What is {x}?", "What's {x}?", "Explain {x}.", "Can you explain {x}?", "Tell me about {x}.",
        "Define {x}.", "What does {x} mean?", "Describe {x}.", "Could you tell me what {x} is?",
        "I would like to know what {x} is.", "Give me a short explanation of {x}.",
        "What do you know about {x}?", "{x}?", "What is meant by {x}?", "Please explain what {x} is.",
        "In short, what is {x}?",
    ),
    "why": (
        "Why use {x}?", "What is {x} good for?", "Why is {x} useful?", "What is the benefit of {x}?",
        "Why does {x} matter?", "What problem does {x} solve?", "What do I gain from {x}?",
        "Why would I want {x}?", "What is the point of {x}?", "What are the advantages of {x}?",
        "Why should I use {x}?", "Why is {x} important?", "What does {x} bring me?",
    ),
    "how": (
        "How does {x} work?", "Explain how {x} works.", "Can you explain how {x} works?",
        "How exactly does {x} work?", "How does {x} work in kvpage?", "Describe how {x} works.",
        "Tell me how {x} works.", "What is the mechanism behind {x}?", "How does {x} function?",
        "Walk me through {x}.", "How does {x} work inside?", "What does {x} do step by step?",
    ),
    "howto": (
        "How do I {x}?", "How can I {x}?", "How to {x}?", "Show me how to {x}.", "Tell me how to {x}.",
        "I want to {x}. How?", "How would I {x}?", "What do I need to do to {x}?",
        "What is the way to {x}?", "Is there a way to {x}?", "Can you show me how to {x}?",
        "Please explain how to {x}.", "What should I do to {x}?", "I need to {x}.",
    ),
    "can": (
        "Can kvpage {x}?", "Is kvpage able to {x}?", "Is it possible for kvpage to {x}?",
        "Could kvpage {x}?", "I wonder whether kvpage can {x}.", "Will kvpage {x}?",
        "Tell me whether kvpage can {x}.", "Does kvpage {x}?", "Do you know if kvpage can {x}?",
        "Is kvpage made to {x}?", "Would kvpage {x}?",
    ),
    "compare": (
        "What is the difference between {x}?", "How do {x} differ?", "Compare {x}.",
        "What distinguishes {x}?", "Explain the difference between {x}.",
        "{x}: what is the difference?", "Tell me the difference between {x}.", "How are {x} different?",
        "Can you compare {x}?", "In what way do {x} differ?", "What sets {x} apart?",
    ),
    "event": (
        "What happens when {x}?", "What happens if {x}?", "What does kvpage do when {x}?",
        "What if {x}?", "Suppose {x}. What happens?", "What will happen if {x}?",
        "How does kvpage react when {x}?", "Tell me what happens when {x}.",
        "What is the effect when {x}?", "Say {x}. What then?", "Explain what happens when {x}.",
        "What does the engine do if {x}?",
    ),
    "ask": (
        "{x}", "Hi, {x}", "Please tell me: {x}", "Hello! {x}", "Quick question: {x}", "One question: {x}",
        "May I ask: {x}", "Tell me: {x}", "I am curious: {x}", "Just asking: {x}", "So, {x}",
    ),
    "say": ("{x}", "{x}!", "{x}."),
}  # fmt: skip

_HELD_BACK_PER_FACT = 2


def normalise(question: str) -> str:
    """Return what makes two questions the same: words and numbers, no case, no punctuation."""
    return " ".join(re.findall(r"[a-z0-9]+", question.casefold().replace("'", "")))


def held_back_templates(fact: Fact) -> tuple[str, ...]:
    """Return the templates with which ``fact`` is never asked in training (none for greetings)."""
    if fact.kind == "say":
        return ()
    # The plainest way to ask ("What is {x}?") is the first of its kind and is always taught.
    return tuple(random.Random(fact.key).sample(TEMPLATES[fact.kind][1:], _HELD_BACK_PER_FACT))


def training_templates(fact: Fact) -> tuple[str, ...]:
    """Return the templates with which ``fact`` may be asked in training."""
    held_back = held_back_templates(fact)
    return tuple(template for template in TEMPLATES[fact.kind] if template not in held_back)


def questions(fact: Fact, templates: tuple[str, ...]) -> list[str]:
    """Return every question that ``templates`` and the names of ``fact`` make."""
    filled = [template.format(x=name) for template in templates for name in fact.names]
    return [text if text.startswith("kvpage") else text[0].upper() + text[1:] for text in filled]
