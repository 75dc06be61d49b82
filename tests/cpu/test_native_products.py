"""Products of packed weights, by every instruction set, against float64 over the numbers that the weight's form means."""

from __future__ import annotations

import ctypes

import pytest
import torch

from kvpage.api.quant import ChannelInt8, Dense, GroupedInt, WeightForm
from kvpage_cpu.native import ISAS, Context, NativeLibraryError, available_isas
from kvpage_cpu.packing import PLAIN, pack

try:
    AVAILABLE = available_isas()
except NativeLibraryError:
    AVAILABLE = ()
ROWS = (1, 3, 40)
OUTPUTS, INPUTS = 135, 1152  # a short last panel; sums over several chunks of K
FORMS = ("float32", "bfloat16", "int8", "int8-per-token", "int4", "int4-offsets", "int4-per-group",
         "int4-per-group-offsets")  # fmt: skip


@pytest.fixture(params=ISAS)
def context(request: pytest.FixtureRequest) -> Context:
    if request.param not in AVAILABLE:
        pytest.skip(f"no {request.param} here")
    return Context(request.param, threads=2)


def form_of(kind: str, outputs: int, inputs: int) -> WeightForm:
    random = torch.Generator().manual_seed(len(kind) + inputs)
    if kind in ("float32", "bfloat16"):
        return Dense(torch.randn(outputs, inputs, generator=random).to(getattr(torch, kind)))
    if kind.startswith("int8"):
        codes = torch.randint(-127, 128, (outputs, inputs), generator=random, dtype=torch.int8)
        scales = torch.rand(outputs, generator=random) + 0.5
        return ChannelInt8(
            codes=codes, scales=scales, activation="per-token" if "per-token" in kind else "none"
        )
    group = 64
    codes = torch.randint(0, 256, (outputs, inputs // 2), generator=random, dtype=torch.uint8)
    scales, offsets = (torch.randn(2, outputs, inputs // group, generator=random)).bfloat16()
    return GroupedInt(
        codes=codes, scales=scales, group=group, offsets=offsets if "offsets" in kind else None,
        activation="per-group" if "per-group" in kind else "none",
    )  # fmt: skip


def as_computed(x: torch.Tensor, form: WeightForm) -> torch.Tensor:
    """x as the form has it computed: itself, or in 8 bits with a scale a row or group."""
    if getattr(form, "activation", "none") == "none":
        return x.double()
    width = form.group if isinstance(form, GroupedInt) else x.shape[1]
    parts = x.view(len(x), -1, width)
    scale = parts.abs().amax(-1, keepdim=True) / 127
    codes = (parts / scale.clamp(min=1e-30)).round()
    return (codes.double() * scale.double()).view_as(x)


def product(
    context: Context, form: WeightForm, x: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    packed = pack(context, form, bias)
    out = torch.full((len(x), form.shape[0] + 5), torch.nan, dtype=dtype)
    code = context.library.kvp_linear(
        context.handle, ctypes.byref(packed.struct), len(x), x.data_ptr(), PLAIN[x.dtype], x.stride(0), out.data_ptr(),
        PLAIN[dtype], out.stride(0),
    )  # fmt: skip
    context.check(code)
    assert out[:, form.shape[0] :].isnan().all(), "nothing is written beyond the outputs"
    return out[:, : form.shape[0]]


def numbers(rows: int, inputs: int) -> torch.Tensor:
    """Rows that bfloat16 holds, of sizes a hundred times apart; beyond their inputs lies NaN."""
    room = torch.full((rows, inputs + 7), torch.nan)
    values = torch.randn(rows, inputs, generator=torch.Generator().manual_seed(rows)).bfloat16().float()
    room[:, :inputs] = values * torch.tensor([1.0, 0.125, 16.0]).repeat(rows)[:rows, None]
    return room[:, :inputs]


@pytest.mark.parametrize("kind", FORMS)
@pytest.mark.parametrize("inputs", [INPUTS, 192])
def test_a_product_is_that_of_the_numbers_which_the_form_means(
    context: Context, kind: str, inputs: int
) -> None:
    form = form_of(kind, OUTPUTS, inputs)
    weight = form.dequantize().double()
    bias = torch.randn(OUTPUTS)
    for rows in ROWS:
        x = numbers(rows, inputs)
        computed = as_computed(x, form)
        error = product(context, form, x, bias, torch.float32) - (computed @ weight.T + bias)
        # A code of x may fall to either side of a half.
        slack = 2e-3 if getattr(form, "activation", "none") != "none" else 2e-5
        assert (error.abs() <= slack * (computed.abs() @ weight.abs().T + 1)).all()


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8", "int8-per-token"])
def test_inputs_that_fill_no_piece_are_padded_with_nothing(context: Context, kind: str) -> None:
    form = form_of(kind, 33, 77)
    x = numbers(5, 77)
    expected = as_computed(x, form) @ form.dequantize().double().T
    assert torch.allclose(
        product(context, form, x, None, torch.float32).double(), expected, rtol=2e-3, atol=0.2
    )


@pytest.mark.parametrize("kind", FORMS)
def test_a_row_has_the_same_bits_however_many_lie_beside_it(context: Context, kind: str) -> None:
    form = form_of(kind, OUTPUTS, INPUTS)
    x = numbers(300, INPUTS)
    whole = product(context, form, x, None, torch.float32)
    for first, count in ((0, 1), (7, 2), (30, 9), (100, 14), (120, 33), (40, 257)):
        part = product(context, form, x[first : first + count], None, torch.float32)
        assert torch.equal(part, whole[first : first + count]), (first, count)


@pytest.mark.parametrize("kind", FORMS)
def test_bfloat16_comes_in_and_goes_out(context: Context, kind: str) -> None:
    form = form_of(kind, OUTPUTS, INPUTS)
    x = numbers(4, INPUTS)
    wide = product(context, form, x, None, torch.float32)
    narrow = product(context, form, x.bfloat16(), None, torch.bfloat16)
    assert torch.equal(narrow, wide.bfloat16())


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8", "int8-per-token"])
def test_a_product_leaves_nothing_behind_for_the_next(context: Context, kind: str) -> None:
    form = form_of(kind, OUTPUTS, 77)
    x = numbers(5, 77)
    before = product(context, form, x, None, torch.float32)
    product(context, form, (x * 1e20).bfloat16(), None, torch.bfloat16)
    assert torch.equal(product(context, form, x, None, torch.float32), before)
