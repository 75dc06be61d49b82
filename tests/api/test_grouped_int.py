"""GroupedInt: the numbers its codes stand for, by its definition; outputs taken and joined; what does not fit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvpage.api.quant import ChannelInt8, GroupedInt

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@st.composite
def forms(draw: st.DrawFn) -> GroupedInt:
    """Any shape that the form has, random codes and scales."""
    bits = draw(st.sampled_from((4, 8)))
    group = draw(st.integers(1, 6)) * (2 if bits == 4 else 1)
    rows, groups = draw(st.integers(1, 6)), draw(st.integers(1, 5))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    stored = group * groups * bits // 8
    codes = torch.randint(0, 256, (rows, stored), generator=generator).to(torch.uint8)
    scales, offsets = (torch.randn(rows, groups, generator=generator) for _ in range(2))
    return GroupedInt(
        codes=codes,
        scales=scales.to(draw(st.sampled_from(DTYPES))),
        group=group,
        bits=bits,
        zero=draw(st.integers(0, 2**bits - 1)),
        offsets=offsets.to(draw(st.sampled_from(DTYPES))) if draw(st.booleans()) else None,
        activation=draw(st.sampled_from(("none", "per-group"))),
    )


def by_definition(form: GroupedInt) -> torch.Tensor:
    """Weight by weight, in float32."""
    values = torch.empty(form.shape)
    for out in range(form.shape[0]):
        for i in range(form.shape[1]):
            code = int(form.codes[out, i * form.bits // 8])
            q = code if form.bits == 8 else code >> 4 * (i % 2) & 15
            value = form.scales[out, i // form.group].float() * (q - form.zero)
            if form.offsets is not None:
                value = value + form.offsets[out, i // form.group].float()
            values[out, i] = value
    return values


@given(forms())
def test_the_values_are_those_of_the_definition(form: GroupedInt) -> None:
    values = form.dequantize()
    assert values.dtype == torch.float32
    assert torch.equal(values, by_definition(form))
    assert form.shape == tuple(values.shape)
    assert form.nbytes == sum(tensor.numel() * tensor.element_size() for tensor in form.tensors())
    assert len(form.tensors()) == (2 if form.offsets is None else 3)


@given(forms(), st.lists(st.integers(0, 5), max_size=8))
def test_taken_outputs_are_rows_of_the_values(form: GroupedInt, wanted: list[int]) -> None:
    rows = torch.tensor([row % form.shape[0] for row in wanted], dtype=torch.int64)
    part = form.take(rows)
    assert torch.equal(part.dequantize(), form.dequantize()[rows])


@given(forms(), st.integers(0, 6))
def test_parts_that_follow_each_other_are_joined_without_a_copy(form: GroupedInt, at: int) -> None:
    at = min(at, form.shape[0] - 1)
    parts = [form.map(lambda tensor: tensor[:at]), form.map(lambda tensor: tensor[at:])]
    if not at:
        parts = parts[1:]
    joined = parts[0].join(parts[1:])
    assert joined is not None
    assert joined.codes.data_ptr() == form.codes.data_ptr()
    assert torch.equal(joined.dequantize(), form.dequantize())
    assert form.join([form]) is None


def test_a_zero_point_a_group_is_an_offset() -> None:
    """weight = scale * (q - z) of GPTQ and AWQ, exactly: float16 scales times small integers fit float32."""
    generator = torch.Generator().manual_seed(0)
    scales = (torch.rand(7, 4, generator=generator) * 0.02).half()
    zeros = torch.randint(0, 17, (7, 4), generator=generator)
    codes = torch.randint(0, 16, (7, 128), generator=generator)
    form = GroupedInt(
        codes=(codes[:, 0::2] | codes[:, 1::2] << 4).to(torch.uint8),
        scales=scales,
        group=32,
        offsets=scales.float() * (8 - zeros),
    )
    wide = scales.float().repeat_interleave(32, 1)
    assert torch.equal(form.dequantize(), wide * (codes - zeros.repeat_interleave(32, 1)))


def make(**changes: Any) -> GroupedInt:
    values: Mapping[str, Any] = {
        "codes": torch.zeros(4, 32, dtype=torch.uint8),
        "scales": torch.ones(4, 2),
        "group": 32,
    }
    return GroupedInt(**{**values, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 3}, "3 bits"),
        ({"zero": 16}, "zero 16"),
        ({"codes": torch.zeros(4, 32, dtype=torch.int8)}, r"codes must be uint8 .* got torch.int8 of shape \[4, 32\]"),
        ({"codes": torch.zeros(4 * 32, dtype=torch.uint8)}, "codes must be uint8 of two dimensions"),
        ({"group": 48}, "groups of 48 do not divide 64 inputs"),
        ({"group": 0}, "groups of 0"),
        ({"scales": torch.ones(4, 3)}, r"scales must be .* of shape \[4, 2\], got torch.float32 of shape \[4, 3\]"),
        ({"scales": torch.ones(4, 2).double()}, "got torch.float64"),
        ({"offsets": torch.ones(2, 4)}, "offsets must be"),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**changes)


def test_forms_of_another_kind_are_not_joined() -> None:
    codes = torch.zeros(8, 32, dtype=torch.uint8)
    scales = torch.ones(8, 2)
    first = make(codes=codes[:4], scales=scales[:4])
    second = make(codes=codes[4:], scales=scales[4:])
    assert first.join([second]) is not None
    for changed in ({"zero": 7}, {"activation": "per-group"}, {"offsets": torch.ones(4, 2)}):
        assert first.join([replace(second, **changed)]) is None, changed
    assert first.join([ChannelInt8(codes=codes[4:].view(torch.int8), scales=torch.ones(4))]) is None
    apart = [make(offsets=torch.ones(8, 2)[:4]), make(offsets=torch.ones(8, 2)[4:])]
    assert apart[0].join(apart[1:]) is None
