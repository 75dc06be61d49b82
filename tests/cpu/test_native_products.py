"""Products of packed weights, by every instruction set, against float64 over the numbers that the weight's form means."""

from __future__ import annotations

import ctypes

import pytest
import torch
from native_forms import MAKERS, PADDED, as_computed, form_of

from kvpage.api.quant import Codebook, Fp8, GroupedInt, WeightForm
from kvpage_cpu.native import ISAS, Context, NativeLibraryError, available_isas
from kvpage_cpu.packing import PLAIN, PackedLinear, context_for, pack

try:
    AVAILABLE = available_isas()
except NativeLibraryError:
    AVAILABLE = ()
ROWS = (1, 3, 40)
OUTPUTS, INPUTS = 135, 1152  # a short last panel; sums over several chunks of K


@pytest.fixture(params=ISAS)
def context(request: pytest.FixtureRequest) -> Context:
    if request.param not in AVAILABLE:
        pytest.skip(f"no {request.param} here")
    return Context(request.param, threads=2)


def share_of_error(context: Context, form: WeightForm) -> float:
    """Of the sum of |x| * |weight|: what a product may be off."""
    if getattr(form, "activation", "none") != "none":
        return 2e-3  # a code of x may fall to either side of a half
    weights_in_bfloat16 = isinstance(form, (GroupedInt, Codebook, Fp8)) and context.isa == "avx512_bf16"
    return 4e-3 if weights_in_bfloat16 else 2e-5


def product(
    context: Context, form: WeightForm, x: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    return product_of(context, pack(context, form, bias), x, form.shape[0], dtype)


def product_of(
    context: Context, packed: PackedLinear, x: torch.Tensor, outputs: int, dtype: torch.dtype
) -> torch.Tensor:
    out = torch.full((len(x), outputs + 5), torch.nan, dtype=dtype)
    code = context.library.kvp_linear(
        context.handle, ctypes.byref(packed.struct), len(x), x.data_ptr(), PLAIN[x.dtype], x.stride(0), out.data_ptr(),
        PLAIN[dtype], out.stride(0),
    )  # fmt: skip
    context.check(code)
    assert out[:, outputs:].isnan().all(), "nothing is written beyond the outputs"
    return out[:, :outputs]


def numbers(rows: int, inputs: int) -> torch.Tensor:
    """Rows that bfloat16 holds, of sizes a hundred times apart; beyond their inputs lies NaN."""
    room = torch.full((rows, inputs + 7), torch.nan)
    values = torch.randn(rows, inputs, generator=torch.Generator().manual_seed(rows)).bfloat16().float()
    room[:, :inputs] = values * torch.tensor([1.0, 0.125, 16.0]).repeat(rows)[:rows, None]
    return room[:, :inputs]


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("inputs", [INPUTS, 384])
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
        allowed = share_of_error(context, form) * (computed.abs() @ weight.abs().T + 1)
        assert (error.abs() <= allowed).all(), float((error.abs() / allowed).max())


@pytest.mark.parametrize("kind", PADDED)
def test_inputs_that_fill_no_piece_are_padded_with_nothing(context: Context, kind: str) -> None:
    form = form_of(kind, 33, 77)
    x = numbers(5, 77)
    computed, weight = as_computed(x, form), form.dequantize().double()
    error = product(context, form, x, None, torch.float32) - computed @ weight.T
    assert (error.abs() <= share_of_error(context, form) * (computed.abs() @ weight.abs().T + 1)).all()


@pytest.mark.parametrize("kind", MAKERS)
def test_a_row_has_the_same_bits_however_many_lie_beside_it(context: Context, kind: str) -> None:
    form = form_of(kind, OUTPUTS, INPUTS)
    x = numbers(300, INPUTS)
    packed = pack(context, form)
    whole = product_of(context, packed, x, OUTPUTS, torch.float32)
    for first, count in (*((7, rows) for rows in range(1, 41)), (120, 65), (40, 257)):
        part = product_of(context, packed, x[first : first + count], OUTPUTS, torch.float32)
        assert torch.equal(part, whole[first : first + count]), (first, count)


@pytest.mark.parametrize("kind", MAKERS)
def test_bfloat16_comes_in_and_goes_out(context: Context, kind: str) -> None:
    form = form_of(kind, OUTPUTS, INPUTS)
    x = numbers(4, INPUTS)
    wide = product(context, form, x, None, torch.float32)
    narrow = product(context, form, x.bfloat16(), None, torch.bfloat16)
    assert torch.equal(narrow, wide.bfloat16())


@pytest.mark.parametrize("kind", PADDED)
def test_a_product_leaves_nothing_behind_for_the_next(context: Context, kind: str) -> None:
    form = form_of(kind, OUTPUTS, 77)
    x = numbers(5, 77)
    before = product(context, form, x, None, torch.float32)
    product(context, form, (x * 1e20).bfloat16(), None, torch.bfloat16)
    assert torch.equal(product(context, form, x, None, torch.float32), before)


@pytest.mark.parametrize("kind", MAKERS)
def test_rows_are_read_as_the_numbers_which_they_stand_for(context: Context, kind: str) -> None:
    """To the last bit, but where the form multiplies by a factor after the scale."""
    form = form_of(kind, OUTPUTS, 384)
    packed = pack(context, form)
    ids = torch.tensor([0, 134, 31, 32, 5, 128, 5])
    out = torch.full((len(ids), 384), torch.nan)
    context.check(
        context.library.kvp_read_rows(
            context.handle, ctypes.byref(packed.struct), len(ids), ids.data_ptr(), out.data_ptr()
        )
    )
    expected = form.dequantize()[ids]
    if getattr(form, "factor", 1.0) == 1.0:
        assert torch.equal(out, expected)
    else:
        torch.testing.assert_close(out, expected, rtol=2e-7, atol=0)


@pytest.mark.parametrize("kind", MAKERS)
def test_a_weight_packed_where_it_lies_is_the_one_packed_apart(context: Context, kind: str) -> None:
    for outputs in (OUTPUTS, 64):
        form = form_of(kind, outputs, 384)
        x = numbers(3, 384)
        apart = product(context, form, x, None, torch.float32)
        for mine, again in zip(form.tensors(), form_of(kind, outputs, 384).tensors(), strict=True):
            assert torch.equal(mine.view(torch.uint8), again.view(torch.uint8)), "only read"
        packed = pack(context, form, in_place=True)
        assert packed.struct.panels == form.tensors()[0].data_ptr(), "written over"
        assert torch.equal(product_of(context, packed, x, outputs, torch.float32), apart)


def test_a_file_of_the_engine_is_packed_without_memory_of_its_own() -> None:
    form = form_of("int4-per-group-super-scales", 64, 384)
    own = {tensor.data_ptr() for tensor in form.tensors()}
    packed = pack(Context("portable", threads=1), form, in_place=True)
    assert {tensor.data_ptr() for tensor in packed.tensors} == own


@pytest.mark.parametrize("kind", [kind for kind in MAKERS if "per-" in kind])
def test_a_float32_model_rounds_no_x(kind: str) -> None:
    form = form_of(kind, OUTPUTS, INPUTS)
    x, weight = numbers(3, INPUTS), form.dequantize().double()
    context = context_for([form], "float32")
    packed = pack(context, form, exact=True)
    error = product_of(context, packed, x, OUTPUTS, torch.float32) - x.double() @ weight.T
    assert (error.abs() <= 2e-6 * (x.double().abs() @ weight.abs().T)).all()
