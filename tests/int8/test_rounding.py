"""Rounding of plain weights: which codes and scales come out, at the ends of the number range too."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvpage.api.quant import GroupedInt
from kvpage_int8.rounding import Rounder


def grouped(weight: torch.Tensor, group: int) -> GroupedInt:
    codes, scales = Rounder().groups(weight, group)
    return GroupedInt(codes=codes, scales=scales, group=group)


def squared_error(values: torch.Tensor, weight: torch.Tensor) -> float:
    return float((values - weight.float()).square().sum() / weight.float().square().sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_int8_is_the_nearest_of_127_steps_each_way(dtype: torch.dtype) -> None:
    weight = torch.randn(40, 33, generator=torch.Generator().manual_seed(0)).to(dtype)
    codes, scales = Rounder().channels(weight)
    exact = weight.float()
    assert torch.equal(scales, exact.abs().amax(1) / 127)
    assert torch.equal(codes, (exact / scales.unsqueeze(1)).round().to(torch.int8))
    assert bool((codes.int().abs().amax(1) == 127).all())


@given(st.integers(0, 2**31), st.sampled_from((32, 64, 128)), st.floats(-30, 30))
def test_int4_gives_multiples_of_a_scale_back_as_they_were(seed: int, group: int, power: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    steps = torch.randint(-8, 8, (3, 4, group), generator=generator)
    steps[:, :, seed % group] = -8  # the whole range is used
    scales = (torch.rand(3, 4, 1, generator=generator) + 0.5).mul(2.0**power).bfloat16()
    weight = (steps * scales.float()).flatten(1)
    assert torch.equal(grouped(weight, group).dequantize(), weight)
    assert torch.equal(grouped(-weight, group).dequantize(), -weight)


def test_int4_is_better_than_the_largest_magnitude_at_7_and_at_8() -> None:
    weight = torch.randn(64, 512, generator=torch.Generator().manual_seed(0))
    groups = weight.view(-1, 128)
    largest = groups.abs().amax(1, keepdim=True)
    found = squared_error(grouped(weight, 128).dequantize(), weight)
    for divisor in (7, 8):
        plain = (groups / (largest / divisor)).round().clamp(-8, 7) * (largest / divisor)
        assert found < 0.9 * squared_error(plain.view_as(weight), weight)


def test_smaller_groups_are_closer() -> None:
    weight = torch.randn(64, 512, generator=torch.Generator().manual_seed(0))
    errors = [squared_error(grouped(weight, group).dequantize(), weight) for group in (32, 64, 128)]
    assert errors == sorted(errors)
    assert errors[0] < 0.75 * errors[2]


def test_an_outputs_codes_do_not_depend_on_the_outputs_beside_it() -> None:
    weight = torch.randn(3000, 512, generator=torch.Generator().manual_seed(0)).bfloat16()
    whole, part = grouped(weight, 64), grouped(weight[1500:1507], 64)
    assert torch.equal(whole.codes[1500:1507], part.codes)
    assert torch.equal(whole.scales[1500:1507], part.scales)
    codes, scales = Rounder().channels(weight)
    few, few_scales = Rounder().channels(weight[1500:1507])
    assert torch.equal(codes[1500:1507], few)
    assert torch.equal(scales[1500:1507], few_scales)


@pytest.mark.parametrize("largest", [0.0, 1e-44, 1e-30, 1e-20, 1.0, 1e20, 1e35])
def test_the_ends_of_the_number_range(largest: float) -> None:
    weight = torch.rand(4, 64, generator=torch.Generator().manual_seed(0)).sub(0.5).mul(2) * largest
    allowed = max(largest / 7, 1e-30)
    assert float((grouped(weight, 32).dequantize() - weight).abs().amax()) <= allowed
    codes, scales = Rounder().channels(weight)
    assert float((codes * scales.unsqueeze(1) - weight).abs().amax()) <= allowed


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_weights_that_are_not_finite_give_scales_that_are_not(value: float) -> None:
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    weight[2, 40] = value
    for scales in (Rounder().channels(weight)[1], Rounder().groups(weight, 32)[1]):
        assert not bool(scales.isfinite().all())
        assert bool(scales[[0, 1, 3]].isfinite().all())
