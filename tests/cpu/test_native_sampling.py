"""The native sampling kernel keeps the set and draws the token of the reference, row by row, to the bit."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvpage.api.sampling import NO_TOKEN, SamplingEnv, Shaping
from kvpage.sample.draw import likeliest, weights

native = pytest.importorskip("kvpage_cpu.native")
try:
    ISAS = native.available_isas()
except native.NativeLibraryError as error:
    pytest.skip(str(error), allow_module_level=True)

from kvpage_cpu.sampling import CpuSampling  # noqa: E402

ROUNDING = 2e-6
"""Of the whole mass: how far float32 probabilities may move a token's edge."""
LAST = 1 - 2.0**-24

ASKED: list[dict[str, Any]] = [
    {},
    {"temperature": 0.7},
    {"top_k": 1},
    {"top_k": 40},
    {"top_k": 6000},
    {"top_p": 0.001},
    {"top_p": 0.5},
    {"top_p": 0.95},
    {"top_p": 0.9999},
    {"min_p": 0.05},
    {"top_k": 50, "top_p": 0.5},
    {"top_k": 5, "min_p": 0.3},
    {"temperature": 1.8, "top_k": 700, "top_p": 0.99, "min_p": 0.001},
]


@pytest.fixture(params=ISAS)
def kernel(request: pytest.FixtureRequest) -> Iterator[CpuSampling]:
    """Two threads, so that rows are shared out."""
    context = native.Context(request.param, threads=2)
    yield CpuSampling(SamplingEnv("cpu", 1), context)
    context.close()


def shaping(
    rows: int, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> Shaping:
    return Shaping(
        np.full(rows, temperature, np.float32),
        np.full(rows, top_k, np.int64),
        np.full(rows, top_p, np.float64),
        np.full(rows, min_p, np.float32),
    )


def points(rows: int, seed: int = 0) -> npt.NDArray[np.float32]:
    """Uniform numbers as the noise has them: multiples of 2**-24."""
    return (np.random.default_rng(seed).integers(0, 2**24, rows) * 2.0**-24).astype(np.float32)


def random_logits(rows: int, vocab_size: int, *, spread: float = 3.0, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * spread


def assert_drawn_as_the_reference_draws(
    kernel: CpuSampling, logits: torch.Tensor, asked: Shaping, uniforms: npt.NDArray[np.float32]
) -> None:
    """Each token is in the reference's kept set, and its part of the CDF holds the uniform number, but for rounding."""
    tokens = torch.from_numpy(kernel.draw(logits.clone(), asked, uniforms)).unsqueeze(-1)
    kept = weights(logits.clone(), asked).double()
    cumulative = kept.cumsum(-1)
    target = torch.from_numpy(uniforms).double() * cumulative[:, -1]
    weight, end = kept.gather(-1, tokens)[:, 0], cumulative.gather(-1, tokens)[:, 0]
    slack = ROUNDING * cumulative[:, -1]
    assert (weight > 0).all(), "a token outside the kept set"
    assert (target <= end + slack).all(), "a token too early"
    assert (target >= end - weight - slack).all(), "a token too late"


@pytest.mark.parametrize("spread", [0.2, 3.0, 15.0])
@pytest.mark.parametrize("vocab_size", [1, 7, 1000, 32000])
def test_tokens_are_those_of_the_reference(kernel: CpuSampling, vocab_size: int, spread: float) -> None:
    logits = random_logits(6, vocab_size, spread=spread, seed=vocab_size)
    for seed, asked in enumerate(ASKED):
        assert_drawn_as_the_reference_draws(kernel, logits, shaping(6, **asked), points(6, seed))


def test_tokens_of_a_large_vocabulary_are_those_of_the_reference(kernel: CpuSampling) -> None:
    logits = random_logits(2, 151936, seed=2)
    for seed, asked in enumerate(ASKED):
        assert_drawn_as_the_reference_draws(kernel, logits, shaping(2, **asked), points(2, seed))


rows_of_logits = st.fixed_dictionaries(
    {
        "vocab_size": st.sampled_from([1, 2, 3, 15, 16, 17, 255, 256, 257, 1025]),
        "levels": st.sampled_from([1, 2, 5, 40, 2000]),
        "forbidden": st.sampled_from([0.0, 0.3, 0.99]),
        "temperature": st.sampled_from([1e-5, 1e-3, 0.05, 0.7, 1.0, 1.5, 30.0]),
        "top_k": st.sampled_from([0, 1, 2, 16, 255, 256, 1024, 5000]),
        "top_p": st.sampled_from([1.0, 0.9999, 0.9, 0.51, 0.1, 1e-6]),
        "min_p": st.sampled_from([0.0, 1e-6, 0.02, 0.5, 1.0]),
        "seed": st.integers(0, 2**32 - 1),
    }
)


@pytest.mark.parametrize("isa", ISAS)
@settings(deadline=None, max_examples=60)
@given(row=rows_of_logits)
def test_ties_masks_and_extremes_are_treated_as_the_reference_treats_them(
    isa: str, row: dict[str, Any]
) -> None:
    """Logits on a grid: weights are equal, or differ by more than rounding, so that kept sets are the same."""
    draw = np.random.default_rng(row["seed"])
    vocab_size = row["vocab_size"]
    logits = torch.from_numpy(draw.integers(0, row["levels"], vocab_size).astype(np.float32) / 64 - 7)
    logits[torch.from_numpy(draw.random(vocab_size) < row["forbidden"])] = -math.inf
    logits[draw.integers(vocab_size)] = 1.5
    names = ("temperature", "top_k", "top_p", "min_p")
    asked = shaping(16, **{name: row[name] for name in names})
    uniforms = np.concatenate((points(14, row["seed"]), np.array([0.0, LAST], np.float32)))
    context = native.Context(isa, threads=1)
    kernel = CpuSampling(SamplingEnv("cpu", vocab_size), context)
    assert_drawn_as_the_reference_draws(kernel, logits.repeat(16, 1), asked, uniforms)


def test_tokens_come_as_often_as_their_probability_says(kernel: CpuSampling) -> None:
    probabilities = torch.tensor([0.3, 0.05, 0.0, 0.25, 0.1, 0.2, 0.0, 0.1])
    count = 40_000
    tokens = kernel.draw(probabilities.log().repeat(count, 1), shaping(count), points(count, 1))
    observed = np.bincount(tokens, minlength=8)
    assert observed[[2, 6]].tolist() == [0, 0]
    possible = probabilities.numpy() > 0
    expected = probabilities.numpy()[possible] * count
    assert ((observed[possible] - expected) ** 2 / expected).sum() < 20.5  # 5 degrees of freedom, p = 0.001


def test_inverse_cdf_runs_in_order_of_token_id(kernel: CpuSampling) -> None:
    logits = torch.tensor([0.25, 0.0, 0.5, 0.25, 0.0]).log()
    uniforms = np.array([0.0, 0.2499, 0.2501, 0.7499, 0.7501, LAST], dtype=np.float32)
    assert kernel.draw(logits.repeat(6, 1), shaping(6), uniforms).tolist() == [0, 0, 2, 2, 3, 3]


def test_a_uniform_number_at_an_edge_is_the_next_token_s(kernel: CpuSampling) -> None:
    """Weights of equal logits, and all their sums, are exact."""
    for vocab_size in (4, 512, 4096):
        uniforms = (np.arange(8) / 8).astype(np.float32)
        expected = [index * vocab_size // 8 for index in range(8)]
        assert kernel.draw(torch.ones(8, vocab_size), shaping(8), uniforms).tolist() == expected


@pytest.mark.parametrize("first", [0, 1, 15, 16, 1023, 1024, 2998])
def test_the_likeliest_token_is_the_lowest_of_equal_ones(kernel: CpuSampling, first: int) -> None:
    logits = random_logits(4, 3000, seed=1)
    logits[:, first] = logits[:, 2999] = 50.0
    logits[1, first] = 0.0
    logits[1].clamp_(max=0.0)
    logits[1, :first] = -1.0
    logits[1, 2999] = -0.0  # equal to 0
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert kernel.likeliest(logits.to(dtype)).tolist() == [first] * 4


@pytest.mark.parametrize("isa", ISAS)
@settings(deadline=None, max_examples=60)
@given(st.integers(1, 2100), st.integers(1, 3000), st.integers(0, 2**32 - 1))
def test_the_likeliest_token_is_the_reference_s(isa: str, vocab_size: int, levels: int, seed: int) -> None:
    draw = np.random.default_rng(seed)
    logits = torch.from_numpy(draw.integers(-levels, levels, (3, vocab_size)).astype(np.float32))
    logits[1, draw.integers(vocab_size)] = math.inf
    logits[2, draw.random(vocab_size) < 0.9] = -math.inf
    kernel = CpuSampling(SamplingEnv("cpu", vocab_size), native.Context(isa, threads=1))
    assert np.array_equal(kernel.likeliest(logits), likeliest(logits))


@pytest.mark.parametrize("place", [0, 17, 299, 1030, 1049])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_rows_without_a_token_say_so_and_leave_the_others_alone(
    kernel: CpuSampling, value: float, place: int
) -> None:
    logits = random_logits(9, 1050, seed=3)
    asked, uniforms = shaping(9, top_k=40, top_p=0.9, min_p=0.01), points(9)
    good = [0, 1, 2, 4, 5, 6, 8]
    greedy, drawn = kernel.likeliest(logits), kernel.draw(logits.clone(), asked, uniforms)
    logits[3, place] = value
    logits[7] = value
    spoilt, missing = kernel.likeliest(logits), kernel.draw(logits.clone(), asked, uniforms)
    assert np.array_equal(spoilt, likeliest(logits))
    assert np.array_equal(spoilt[good], greedy[good])
    assert np.array_equal(missing[good], drawn[good])
    assert missing[7] == NO_TOKEN
    assert (missing[3] == NO_TOKEN) == (value != -math.inf)


def test_logits_that_overflow_when_divided_have_no_token(kernel: CpuSampling) -> None:
    logits = torch.tensor([[1e38, 0.0], [-1e38, -2e38], [1e38, 1e38]])
    for temperature, expected in ((1e-5, [NO_TOKEN] * 3), (1.0, [0, 0, 1])):
        asked = shaping(3, temperature=temperature)
        assert kernel.draw(logits.clone(), asked, np.full(3, 0.75, np.float32)).tolist() == expected


def test_a_row_of_temperature_0_takes_its_likeliest_token_beside_rows_that_draw(kernel: CpuSampling) -> None:
    logits = random_logits(5, 500, seed=4)
    mixed = shaping(5)
    mixed.temperature[[0, 3]] = 0.0
    logits[3, 77] = math.inf
    found = kernel.draw(logits.clone(), mixed, points(5))
    assert found[[0, 3]].tolist() == likeliest(logits)[[0, 3]].tolist()
    drawn = [1, 2, 4]
    assert np.array_equal(found[drawn], kernel.draw(logits[drawn], shaping(3), points(5)[drawn]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_logits_give_the_token_of_their_float32_values(
    kernel: CpuSampling, dtype: torch.dtype
) -> None:
    logits = random_logits(7, 1333, seed=6).to(dtype)
    asked, uniforms = shaping(7, temperature=0.8, top_k=300, top_p=0.97), points(7)
    expected = kernel.draw(logits.float(), asked, uniforms)
    assert np.array_equal(kernel.draw(logits.clone(), asked, uniforms), expected)
    assert np.array_equal(kernel.likeliest(logits), likeliest(logits.float()))


@pytest.mark.parametrize("vocab_size", [7, 1000, 32000])
def test_a_row_gives_the_same_token_wherever_it_stands_to_the_bit(
    kernel: CpuSampling, vocab_size: int
) -> None:
    """Uniform numbers at edges of the CDF, where one bit of one sum changes the token."""
    asked: list[dict[str, Any]] = [
        {"temperature": 1.1},
        {"top_k": 400},
        {"top_p": 0.9},
        {"top_k": 3000, "top_p": 0.8},
    ] * 4
    rows = len(asked)
    logits = random_logits(rows, vocab_size, spread=1.0, seed=8)
    single = [shaping(1, **row) for row in asked]
    names = ("temperature", "top_k", "top_p", "min_p")
    together = Shaping(*(np.concatenate([getattr(row, name) for row in single]) for name in names))
    cumulative = weights(logits.clone(), together).double().cumsum(-1)
    edges = cumulative[torch.arange(rows), torch.arange(rows) * vocab_size // rows] / cumulative[:, -1]
    uniforms = edges.float().clamp(max=LAST).numpy()

    tokens = kernel.draw(logits.clone(), together, uniforms)
    for row in range(rows):  # alone, at another address, rows further apart
        wide = torch.full((2, vocab_size + 9), math.nan)
        wide[0, 1 + row % 8 : 1 + row % 8 + vocab_size] = logits[row]
        part = wide[:1, 1 + row % 8 : 1 + row % 8 + vocab_size]
        assert kernel.draw(part, single[row], uniforms[row : row + 1]).tolist() == [tokens[row]]
    order = np.random.default_rng(0).permutation(rows)
    shuffled = kernel.draw(logits[torch.from_numpy(order)], together.rows(order), uniforms[order])
    assert np.array_equal(shuffled, tokens[order])
    columns = logits.T.contiguous().T  # tokens lie apart
    assert np.array_equal(kernel.draw(columns, together, uniforms), tokens)


def test_no_rows_are_no_tokens(kernel: CpuSampling) -> None:
    assert kernel.likeliest(torch.empty(0, 5)).tolist() == []
    assert kernel.draw(torch.empty(0, 5), shaping(0), points(0)).tolist() == []
