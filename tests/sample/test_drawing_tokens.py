"""From a row of logits to a token: kept sets as transformers' warpers make them, ties, frequencies, bad rows."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from kvpage.api.sampling import NO_TOKEN, SamplingEnv, Shaping
from kvpage.sample.draw import TorchSampling, draw, likeliest, weights

COMBINATIONS = [
    {"temperature": 0.7},
    {"top_k": 1},
    {"top_k": 40},
    {"top_k": 600},
    {"top_p": 0.1},
    {"top_p": 0.95},
    {"top_p": 0.9999},
    {"min_p": 0.05},
    {"top_k": 50, "top_p": 0.5},
    {"top_k": 5, "min_p": 0.3},
    {"temperature": 0.3, "top_k": 100, "top_p": 0.9, "min_p": 0.01},
    {"temperature": 1.8, "top_p": 0.8, "min_p": 0.02},
    {"top_k": 700, "top_p": 0.99},
]


def shaping(
    rows: int, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> Shaping:
    return Shaping(
        np.full(rows, temperature, np.float32),
        np.full(rows, top_k, np.int64),
        np.full(rows, top_p, np.float64),
        np.full(rows, min_p, np.float32),
    )


def random_logits(rows: int, vocab_size: int, *, spread: float = 3.0, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * spread


def oracle(
    logits: torch.Tensor, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> torch.Tensor:
    """Probabilities after transformers' warpers, in float64 so that no cut hangs on rounding."""
    scores = TemperatureLogitsWarper(temperature)(None, logits.double())
    if top_k:
        scores = TopKLogitsWarper(top_k)(None, scores)
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(None, scores)
    if min_p:
        scores = MinPLogitsWarper(min_p)(None, scores)
    return scores.softmax(-1)


@pytest.mark.parametrize("spread", [0.2, 3.0, 15.0])
@pytest.mark.parametrize("asked", COMBINATIONS, ids=str)
def test_kept_sets_and_probabilities_are_those_of_transformers(
    asked: dict[str, float], spread: float
) -> None:
    logits = random_logits(12, 1500, spread=spread, seed=5)
    expected = oracle(logits, **asked)
    found = weights(logits.clone(), shaping(12, **asked)).double()
    visible = expected > 1e-40  # below that float32 has no weight left, kept or not
    assert torch.equal(visible & (found > 0), visible)
    assert not ((found > 0) & (expected == 0)).any()
    torch.testing.assert_close(found / found.sum(-1, keepdim=True), expected, rtol=1e-4, atol=1e-12)


def test_top_k_keeps_all_tokens_that_tie_with_the_last() -> None:
    kept = weights(torch.tensor([[3.0, 1.0, 2.0, 2.0, 2.0, 0.0]]), shaping(1, top_k=2)) > 0
    assert kept.tolist() == [[True, False, True, True, True, False]]


def test_top_k_keeps_ties_without_end() -> None:
    logits = torch.zeros(2, 3000)
    logits[:, 7] = 5.0
    assert (weights(logits.clone(), shaping(2, top_k=2, top_p=1.0)) > 0).all()
    assert (weights(logits.clone(), shaping(2, top_k=2, top_p=0.5)) > 0).all()


def test_top_p_counts_the_mass_of_all_that_tie_within_top_k() -> None:
    probabilities = torch.full((1, 3001), 0.6 / 3000)
    probabilities[0, 7] = 0.4
    assert (weights(probabilities.log(), shaping(1, top_k=2, top_p=0.5)) > 0).all()
    assert int((weights(probabilities.log(), shaping(1, top_k=2, top_p=0.3)) > 0).sum()) == 1


def test_top_p_keeps_the_token_that_crosses_and_what_ties_with_it() -> None:
    logits = torch.tensor([[0.4, 0.2, 0.2, 0.2]]).log()
    for top_p, kept in ((0.3, 1), (0.41, 4), (0.9, 4)):
        assert int((weights(logits.clone(), shaping(1, top_p=top_p)) > 0).sum()) == kept
    logits = torch.tensor([[0.15, 0.5, 0.3, 0.05]]).log()
    for top_p, ids in ((0.49, [1]), (0.51, [1, 2]), (0.81, [0, 1, 2]), (0.96, [0, 1, 2, 3])):
        assert (weights(logits.clone(), shaping(1, top_p=top_p))[0] > 0).nonzero().flatten().tolist() == ids


def test_top_p_counts_mass_within_top_k() -> None:
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()  # of the top two, the first has 4/7 = 0.571
    assert int((weights(logits.clone(), shaping(1, top_k=2, top_p=0.57)) > 0).sum()) == 1
    assert int((weights(logits.clone(), shaping(1, top_k=2, top_p=0.58)) > 0).sum()) == 2


def test_min_p_is_relative_to_the_likeliest() -> None:
    logits = torch.tensor([[0.5, 0.26, 0.24]]).log()
    assert (weights(logits, shaping(1, min_p=0.5))[0] > 0).tolist() == [True, True, False]


@pytest.mark.parametrize("spread", [0.0, 0.5, 4.0, 60.0])
@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.95, 0.999999])
def test_top_p_cuts_where_a_sort_of_the_whole_row_cuts(spread: float, top_p: float) -> None:
    """Flat rows need the whole sort, peaked ones only the head; both must give the set of the definition."""
    logits = random_logits(9, 4000, spread=spread, seed=2)
    probabilities = torch.softmax(logits, -1).numpy()
    found = weights(logits.clone(), shaping(9, top_p=top_p)).numpy()
    for row, kept in zip(probabilities, found, strict=True):
        ordered = np.sort(row)[::-1]
        running = np.cumsum(ordered, dtype=np.float64)
        threshold = ordered[min(int(np.searchsorted(running, top_p)), len(row) - 1)]
        assert np.array_equal(kept, np.where(row >= threshold, row, 0))


def test_tokens_come_as_often_as_their_probability_says() -> None:
    probabilities = torch.tensor([0.3, 0.05, 0.0, 0.25, 0.1, 0.2, 0.0, 0.1])
    count = 40_000
    points = (np.random.default_rng(1).integers(0, 2**24, count) * 2.0**-24).astype(np.float32)
    tokens = draw(probabilities.log().repeat(count, 1), shaping(count), points)
    observed = np.bincount(tokens, minlength=8)
    assert observed[[2, 6]].tolist() == [0, 0]
    possible = probabilities.numpy() > 0
    expected = probabilities.numpy()[possible] * count
    assert ((observed[possible] - expected) ** 2 / expected).sum() < 20.5  # 5 degrees of freedom, p = 0.001


def test_inverse_cdf_runs_in_order_of_token_id() -> None:
    logits = torch.tensor([0.25, 0.0, 0.5, 0.25, 0.0]).log()
    points = np.array([0.0, 0.2499, 0.25, 0.7499, 0.75, 1 - 2.0**-24], dtype=np.float32)
    assert draw(logits.repeat(6, 1), shaping(6), points).tolist() == [0, 0, 2, 2, 3, 3]


def test_greedy_takes_the_lowest_id_of_equal_logits() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0], [2.0, 2.0, 2.0], [0.0, -1.0, 0.5]])
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert likeliest(logits.to(dtype)).tolist() == [1, 0, 2]


def test_rows_that_have_no_token_say_so_and_leave_the_others_alone() -> None:
    logits = random_logits(24, 300, seed=3)
    alone = likeliest(logits)
    points = np.linspace(0, 0.99, 24, dtype=np.float32)
    drawn = draw(logits.clone(), shaping(24, top_k=40, top_p=0.9, min_p=0.01), points)
    logits[3, 17] = math.nan
    logits[11] = -math.inf
    logits[20] = math.nan
    greedy, sampled = (
        likeliest(logits),
        draw(logits.clone(), shaping(24, top_k=40, top_p=0.9, min_p=0.01), points),
    )
    bad = [3, 11, 20]
    assert greedy[bad].tolist() == sampled[bad].tolist() == [NO_TOKEN] * 3
    good = np.delete(np.arange(24), bad)
    assert np.array_equal(greedy[good], alone[good])
    assert np.array_equal(sampled[good], drawn[good])


def test_a_row_of_temperature_0_takes_its_likeliest_token_beside_rows_that_draw() -> None:
    logits = random_logits(5, 50, seed=4)
    points = np.linspace(0, 0.99, 5, dtype=np.float32)
    mixed = shaping(5)
    mixed.temperature[[0, 3]] = 0.0
    expected = draw(logits.clone(), shaping(5), points)
    expected[[0, 3]] = likeliest(logits)[[0, 3]]
    kernel = TorchSampling(SamplingEnv("cpu", 50))
    assert np.array_equal(kernel.draw(logits.clone(), mixed, points), expected)
    mixed.temperature[:] = 0.0
    assert np.array_equal(kernel.draw(logits.clone(), mixed, points), likeliest(logits))


asked_rows = st.fixed_dictionaries(
    {
        "temperature": st.floats(0.05, 3.0),
        "top_k": st.sampled_from([0, 1, 3, 50, 700, 5000]),
        "top_p": st.sampled_from([1.0, 0.999, 0.9, 0.3]),
        "min_p": st.sampled_from([0.0, 0.02, 0.5]),
    }
)


@settings(deadline=None, max_examples=40)
@given(
    st.lists(asked_rows, min_size=1, max_size=20), st.integers(0, 2**32 - 1), st.sampled_from([1, 97, 1003])
)
def test_a_row_is_worked_out_alike_whatever_rows_are_beside_it(
    asked: list[dict[str, float]],
    seed: int,
    vocab_size: int,
) -> None:
    logits = random_logits(len(asked), vocab_size, spread=4.0, seed=seed)
    single = [shaping(1, **row) for row in asked]
    together = Shaping(
        *(
            np.concatenate([getattr(row, name) for row in single])
            for name in ("temperature", "top_k", "top_p", "min_p")
        )
    )
    batch = weights(logits.clone(), together)
    for index, row in enumerate(single):
        assert torch.equal(weights(logits[index : index + 1].clone(), row)[0], batch[index])
    points = np.random.default_rng(seed).random(len(asked), dtype=np.float32)
    tokens = draw(logits.clone(), together, points)
    for index, row in enumerate(single):
        assert draw(logits[index : index + 1].clone(), row, points[index : index + 1]).tolist() == [
            tokens[index]
        ]
