"""Sampling noise: known answers that every implementation of kvpage's noise must give."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvpage.sample.noise import philox4x32_10, uniform, uniforms

ANSWERS = json.loads((Path(__file__).parents[1] / "data" / "philox.json").read_text(encoding="utf-8"))
TABLE = [(int(seed), int(position), stream, bits) for seed, position, stream, bits in ANSWERS["uniforms"]]


def words(texts: list[str]) -> tuple[int, ...]:
    return tuple(int(text, 16) for text in texts)


def vectorised(triples: list[tuple[int, int, int]]) -> list[float]:
    seeds, positions, streams = zip(*triples, strict=True)
    result = uniforms(np.array(seeds, np.uint64), np.array(positions, np.int64), np.array(streams, np.int64))
    assert result.dtype == np.float32
    return result.tolist()


@pytest.mark.parametrize("answer", ANSWERS["philox4x32_10"])
def test_philox_gives_the_known_answers_of_random123(answer: dict[str, list[str]]) -> None:
    assert philox4x32_10(words(answer["counter"]), words(answer["key"])) == words(answer["words"])  # type: ignore[arg-type]


def test_a_uniform_is_the_first_words_upper_24_bits() -> None:
    for seed, position, stream, bits in TABLE:
        key, counter = (seed % 2**32, seed // 2**32), (position % 2**32, position // 2**32, stream, 0)
        assert philox4x32_10(counter, key)[0] >> 8 == bits
        assert uniform(seed, position, stream) == bits * 2.0**-24


def test_many_at_once_equal_the_table() -> None:
    assert vectorised([row[:3] for row in TABLE]) == [bits * 2.0**-24 for *_, bits in TABLE]


@given(
    st.lists(
        st.tuples(st.integers(0, 2**64 - 1), st.integers(0, 2**62), st.integers(0, 2**32 - 1)),
        min_size=1,
        max_size=40,
    )
)
def test_many_at_once_equal_one_at_a_time(triples: list[tuple[int, int, int]]) -> None:
    assert vectorised(triples) == [uniform(*triple) for triple in triples]


def test_each_of_seed_position_and_stream_changes_the_noise() -> None:
    grid = {(s, p, c): uniform(s, p, c) for s in (3, 2**40) for p in range(20) for c in range(20)}
    assert len(set(grid.values())) == len(grid)


def test_uniforms_cover_the_unit_interval_evenly() -> None:
    count = 20_000
    values = uniforms(np.full(count, 9, np.uint64), np.arange(count), np.zeros(count, np.int64))
    assert values.min() >= 0
    assert values.max() < 1
    expected = count / 20
    observed, _ = np.histogram(values, bins=20, range=(0, 1))
    assert (
        (observed - expected) ** 2 / expected
    ).sum() < 43.8  # chi-square, 19 degrees of freedom, p = 0.001
