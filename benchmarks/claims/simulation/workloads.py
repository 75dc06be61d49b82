"""Request lengths, drawn from stated distributions with a seed: no data set is needed."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass

MAX_MODEL_LEN = 2048


@dataclass(frozen=True, slots=True)
class Job:
    """One request: prompt tokens, and the tokens it will generate (which only an oracle knows beforehand)."""

    prompt: int
    output: int

    @property
    def slots(self) -> int:
        """KV slots it ends with: the last token is never computed."""
        return self.prompt + self.output - 1


@dataclass(frozen=True, slots=True)
class Workload:
    """Where lengths come from.

    Attributes:
        about: the distribution in words.
        draw_prompt, draw_output: one length, in tokens.
        max_tokens: the limit that every request states; no output is longer.
    """

    name: str
    about: str
    draw_prompt: Callable[[random.Random], int]
    draw_output: Callable[[random.Random], int]
    max_tokens: int

    def jobs(self, tokens: int, seed: int) -> list[Job]:
        """Requests in order of arrival until they add up to ``tokens``; the same ones for the same seed."""
        draw = random.Random(f"{self.name} {seed}")
        jobs: list[Job] = []
        while tokens > 0:
            jobs.append(Job(self.draw_prompt(draw), self.draw_output(draw)))
            tokens -= jobs[-1].slots
        return jobs


def lognormal(mean: float, spread: float, low: int, high: int) -> Callable[[random.Random], int]:
    """Lengths whose logarithm has standard deviation ``spread``; ``mean`` is that before cutting to the range."""
    location = math.log(mean) - spread**2 / 2
    return lambda draw: min(high, max(low, round(draw.lognormvariate(location, spread))))


def uniform(low: int, high: int) -> Callable[[random.Random], int]:
    """Every length of the range is equally likely."""
    return lambda draw: draw.randint(low, high)


def _chat(name: str, spread: float) -> Workload:
    return Workload(
        name,
        f"lognormal, means 161 + 338, spread {spread:g}, prompt and output cut to 1..1024",
        lognormal(161.31, spread, 1, 1024),
        lognormal(337.99, spread, 1, 1024),
        1024,
    )


SHAREGPT = _chat("ShareGPT-like", 1.0)
"""Means of arXiv:2309.06180, figure 11, for ShareGPT with a 13B model."""
ALPACA = Workload(
    "Alpaca-like",
    "lognormal, means 19 + 58, spread 0.8, prompt and output cut to 1..512",
    lognormal(19.31, 0.8, 1, 512),
    lognormal(58.45, 0.8, 1, 512),
    512,
)
"""Means of the same figure for Alpaca."""
NARROW, WIDE = _chat("narrow", 0.4), _chat("wide", 1.6)
LONG = Workload(
    "near the limit", "uniform, 512..1024 + 768..1024", uniform(512, 1024), uniform(768, 1024), 1024
)

WORKLOADS = (SHAREGPT, ALPACA, NARROW, WIDE, LONG)
