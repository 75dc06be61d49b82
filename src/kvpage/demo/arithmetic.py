"""Sums, differences and products, and which operands are held back from training."""

from __future__ import annotations

import random
from dataclasses import dataclass

__all__ = [
    "PHRASES", "Problem", "draw", "draw_close", "held_back_pairs", "held_back_problems", "phrase", "table_problems",
]  # fmt: skip

_LARGEST = 99
_LARGEST_FACTOR = 12
_HELD_BACK_SHARE = 0.1

PHRASES: dict[str, tuple[str, ...]] = {
    "+": (
        "What is {a} + {b}?", "{a} + {b}", "{a} + {b} =", "{a}+{b}", "{a}+{b}=", "{a} + {b} = ?",
        "How much is {a} + {b}?", "What is {a} plus {b}?", "How much is {a} plus {b}?", "{a} plus {b}",
        "Add {a} and {b}.", "Calculate {a} + {b}.", "Compute {a} + {b}.", "What's {a} + {b}?",
        "What is the sum of {a} and {b}?", "Can you add {a} and {b}?", "Please work out {a} + {b}.",
        "What do {a} and {b} make?", "Hi, what is {a} + {b}?", "Can you tell me {a} + {b}?",
    ),
    "-": (
        "What is {a} - {b}?", "{a} - {b}", "{a} - {b} =", "{a}-{b}", "{a}-{b}=", "{a} - {b} = ?",
        "How much is {a} - {b}?", "What is {a} minus {b}?", "How much is {a} minus {b}?",
        "{a} minus {b}", "Subtract {b} from {a}.", "Calculate {a} - {b}.", "Compute {a} - {b}.",
        "What's {a} - {b}?", "Take {b} away from {a}.", "Can you subtract {b} from {a}?",
        "Please work out {a} - {b}.", "Hi, what is {a} - {b}?", "Can you tell me {a} - {b}?",
    ),
    "*": (
        "What is {a} * {b}?", "{a} * {b}", "{a} * {b} =", "{a}*{b}", "{a} x {b}", "{a}*{b}=",
        "How much is {a} * {b}?", "What is {a} times {b}?", "How much is {a} times {b}?",
        "{a} times {b}", "Multiply {a} by {b}.", "Calculate {a} * {b}.", "Compute {a} x {b}.",
        "What's {a} * {b}?", "What is {a} x {b}?", "What is the product of {a} and {b}?",
        "Can you multiply {a} by {b}?", "Hi, what is {a} * {b}?", "Can you tell me {a} * {b}?",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Problem:
    """``a operator b``, with 0 to 99 (0 to 12 for products) on both sides."""

    a: int
    operator: str
    b: int

    @property
    def result(self) -> int:
        if self.operator == "+":
            return self.a + self.b
        return self.a - self.b if self.operator == "-" else self.a * self.b

    @property
    def left(self) -> str:
        """The problem as text, up to and with the equals sign."""
        return f"{self.a} {self.operator} {self.b} ="

    @property
    def right(self) -> str:
        """What follows the equals sign: the tens of b are dealt with first, then its ones.

        47 + 38 = 77 + 8 = 85 and 38 - 85 = -(85 - 38) = -(55 - 8) = -47: each step is small enough for a
        small model, which has no room to carry between digits in its head.
        """
        if self.operator == "-" and self.a < self.b:
            turned = Problem(self.b, "-", self.a)
            steps = [f"{turned.a} - {turned.b}", *turned._steps]
            return " = ".join([*(f"-({step})" for step in steps), str(self.result)])
        return " = ".join([*self._steps, str(self.result)])

    @property
    def _steps(self) -> list[str]:
        tens = self.b - self.b % 10
        if self.operator == "*" or tens in (0, self.b):
            return []
        return [f"{Problem(self.a, self.operator, tens).result} {self.operator} {self.b - tens}"]

    @property
    def answer(self) -> str:
        return f"{self.left} {self.right}."

    @property
    def pair(self) -> tuple[int, int]:
        """The operands without their order: a + b and b + a (a - b and b - a) are one thing."""
        return min(self.a, self.b), max(self.a, self.b)


def held_back_pairs(operator: str) -> frozenset[tuple[int, int]]:
    """Return the unordered pairs of operands that training never shows, in neither order.

    Sums and differences hold back a tenth of the pairs of two-digit numbers. Problems with a one-digit
    operand are steps of the larger ones, and the multiplication table is learned by heart: there nothing is
    held back.
    """
    if operator == "*":
        return frozenset()
    numbers = range(_LARGEST + 1)
    pairs = [(a, b) for a in numbers for b in numbers if 10 <= a <= b]
    return frozenset(random.Random(f"held back {operator}").sample(pairs, int(len(pairs) * _HELD_BACK_SHARE)))


_HELD_BACK = {operator: held_back_pairs(operator) for operator in PHRASES}


def draw(random_: random.Random, operator: str | None = None) -> Problem:
    """Draw a training problem: never a held-back pair, and small numbers more often than their share."""
    chosen = operator or random_.choices("+-*", weights=(42, 42, 16))[0]
    while True:
        if chosen == "*":
            return Problem(random_.randint(0, _LARGEST_FACTOR), "*", random_.randint(0, _LARGEST_FACTOR))
        size = random_.random()
        largest_a, largest_b = (12, 12) if size < 0.15 else (_LARGEST, 9 if size < 0.35 else _LARGEST)
        problem = Problem(random_.randint(0, largest_a), chosen, random_.randint(0, largest_b))
        if problem.pair not in _HELD_BACK[chosen]:
            return problem


def draw_close(random_: random.Random) -> Problem:
    """Draw a training problem of the sorts that go wrong most: differences of close numbers, small operands.

    Which of two close numbers is the larger one has to be known before the first digit of the answer.
    """
    while True:
        kind = random_.random()
        if kind < 0.35:
            a = random_.randint(10, _LARGEST)
            problem = Problem(a, "-", min(_LARGEST, max(10, a + random_.randint(-12, 12))))
        elif kind < 0.6:
            tens = 10 * random_.randint(1, 9)
            problem = Problem(tens + random_.randint(0, 9), "-", tens + random_.randint(0, 9))
        else:
            problem = Problem(random_.randint(0, 12), random_.choice("+-**"), random_.randint(0, 12))
        if problem.pair not in _HELD_BACK[problem.operator]:
            return problem


def phrase(random_: random.Random, problem: Problem) -> str:
    """Return one way to ask for ``problem``."""
    return random_.choice(PHRASES[problem.operator]).format(a=problem.a, b=problem.b)


def table_problems() -> list[Problem]:
    """Return the whole multiplication table; all of it is in the training text."""
    factors = range(_LARGEST_FACTOR + 1)
    return [Problem(a, "*", b) for a in factors for b in factors]


def held_back_problems(operator: str, count: int, seed: int) -> list[Problem]:
    """Return ``count`` different problems whose pairs are held back, in a random order of operands."""
    random_ = random.Random(f"{operator} {seed}")
    pairs = random_.sample(sorted(_HELD_BACK[operator]), count)
    return [_ordered(random_, a, operator, b) for a, b in pairs]


def _ordered(random_: random.Random, a: int, operator: str, b: int) -> Problem:
    return Problem(a, operator, b) if random_.random() < 0.5 else Problem(b, operator, a)
