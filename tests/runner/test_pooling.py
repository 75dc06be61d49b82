"""The pooler: states of a prompt, in chunks and beside other rows, made into one vector."""

from __future__ import annotations

import math
from array import array

import pytest
import torch

from kvpage.params import PoolingParams
from kvpage.runner.pooling import Pooler
from kvpage.sched.plan import StepPlan

WIDTH = 24


def plan_of(rows: list[tuple[int, int, int]], pool_rows: list[int]) -> StepPlan:
    """(slot, start, count) of each row."""
    slots, starts, counts = (array("i", column) for column in zip(*rows, strict=True))
    return StepPlan(0, slots=slots, starts=starts, counts=counts, pool_rows=array("i", pool_rows))


def states(count: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(count, WIDTH, generator=generator) * 1e3).to(dtype)


def vector_of(hidden: torch.Tensor, params: PoolingParams, chunks: list[int]) -> array[float]:
    """The vector of a prompt that is computed in ``chunks``, each beside a row of another slot."""
    pooler = Pooler()
    pooler.admit(3, params)
    start = 0
    found: list[array[float]] = []
    for count in chunks:
        last = start + count == len(hidden)
        other = states(2, seed=start)
        step = torch.cat([other, hidden[start : start + count]])
        found, errors = pooler.pool(plan_of([(0, 0, 2), (3, start, count)], [1] if last else []), step)
        assert errors == {}
        start += count
    assert len(found) == 1
    return found[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_mean_is_that_of_float64_however_it_is_cut(dtype: torch.dtype) -> None:
    hidden = states(50, dtype=dtype)
    params = PoolingParams(normalize=False)
    expected = hidden.double().mean(0).float().tolist()
    for chunks in ([50], [1] * 50, [17, 1, 32]):
        assert list(vector_of(hidden, params, chunks)) == pytest.approx(expected, rel=1e-7)


def test_the_last_state_is_taken_as_it_is() -> None:
    hidden = states(9, dtype=torch.bfloat16)
    params = PoolingParams(pooling="last", normalize=False)
    for chunks in ([9], [4, 5], [8, 1]):
        assert list(vector_of(hidden, params, chunks)) == hidden[-1].float().tolist()


def test_normalised_vectors_have_length_one_and_a_zero_vector_stays() -> None:
    vector = vector_of(states(9), PoolingParams(), [9])
    assert math.hypot(*vector) == pytest.approx(1.0, abs=1e-6)
    assert list(vector_of(torch.zeros(2, WIDTH), PoolingParams(), [2])) == [0.0] * WIDTH


def test_states_that_are_not_finite_are_an_error_of_their_prompt_alone() -> None:
    pooler = Pooler()
    for slot in (0, 1):
        pooler.admit(slot, PoolingParams())
    hidden = states(4)
    hidden[1, 5] = math.nan
    vectors, errors = pooler.pool(plan_of([(0, 0, 2), (1, 0, 2)], [0, 1]), hidden)
    assert list(errors) == [0]
    assert "not finite" in errors[0]
    assert len(vectors[1]) == WIDTH


def test_a_slot_that_is_taken_again_starts_from_nothing() -> None:
    pooler = Pooler()
    pooler.admit(0, PoolingParams(normalize=False))
    pooler.pool(plan_of([(0, 0, 3)], []), states(3, seed=1))
    pooler.release(0)
    pooler.admit(0, PoolingParams(normalize=False))
    hidden = states(2)
    vectors, _ = pooler.pool(plan_of([(0, 0, 2)], [0]), hidden)
    assert list(vectors[0]) == pytest.approx(hidden.double().mean(0).tolist(), rel=1e-6)
