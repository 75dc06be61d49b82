"""Linear layers: right, merged where their weights allow it, and independent of the rows beside them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from kvpage.api.model import DecoderEnv
from kvpage.api.quant import Dense, LinearChoice, LinearEnv, LinearKernel, WeightForm, adjacent
from kvpage.errors import PluginError
from kvpage.nn.linear import DenseLinear, build_fused, build_linear, make_kernel

ENV = DecoderEnv(device="cpu", dtype="float32")
SHAPES = [(768, 1280), (1536, 512), (2048, 768), (768, 768), (96, 72), (100, 36), (40, 7)]


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def stored_in_out(weight: torch.Tensor) -> torch.Tensor:
    """The same [out, in], in the layout of a checkpoint that stores its weights [in, out]."""
    return weight.t().contiguous().t()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("transposed", [True, False], ids=["stored-in-out", "stored-out-in"])
@pytest.mark.parametrize(("inputs", "outputs"), SHAPES)
@torch.inference_mode()
def test_a_row_does_not_depend_on_the_rows_beside_it(
    inputs: int, outputs: int, transposed: bool, dtype: torch.dtype
) -> None:
    weight = random(outputs, inputs, dtype=dtype)
    kernel = make_kernel(
        Dense(stored_in_out(weight) if transposed else weight), random(outputs, dtype=dtype), ENV
    )
    x = random(70, inputs, dtype=dtype, seed=1)
    together = kernel.forward(x)
    for rows in (*range(1, 20), 33, 64):
        assert torch.equal(kernel.forward(x[:rows]), together[:rows]), f"{rows} rows differ from 70"
    assert torch.equal(kernel.forward(x[41:42]), together[41:42])


@torch.inference_mode()
def test_without_onednn_too_a_row_does_not_depend_on_the_rows_beside_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("kvpage.nn.linear.find_onednn", lambda: None)
    kernel = make_kernel(Dense(random(72, 96)), None, ENV)
    x = random(64, 96, seed=1)
    together = kernel.forward(x)
    for rows in (1, 2, 3, 4, 5, 11, 16):
        assert torch.equal(kernel.forward(x[:rows]), together[:rows])


@pytest.mark.parametrize("bias", [True, False])
@torch.inference_mode()
def test_it_computes_what_torch_computes(bias: bool) -> None:
    weight, offset = random(72, 96), random(72, seed=2) if bias else None
    kernel = make_kernel(Dense(stored_in_out(weight)), offset, ENV)
    for x in (random(5, 96, seed=1), random(1, 96, seed=1), random(5, 2, 96, seed=1)[:, 1], random(0, 96)):
        torch.testing.assert_close(kernel.forward(x), F.linear(x, weight, offset))


class Counting(DenseLinear):
    """A kernel that counts its products."""

    name = "counting"
    products = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        type(self).products += 1
        return super().forward(x)


@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("merged", [True, False])
@torch.inference_mode()
def test_parts_in_one_tensor_are_one_product(
    merged: bool, transposed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Counting, "products", 0)
    whole, biases = random(72, 96), random(72, seed=3)
    parts = list((stored_in_out(whole) if transposed else whole).split([40, 16, 16]))
    if not merged:
        parts = [part.clone() for part in parts]
    weights = {f"{n}.weight": Dense(part) for n, part in zip("qkv", parts, strict=True)}
    weights |= {f"{n}.bias": Dense(part) for n, part in zip("qkv", biases.split([40, 16, 16]), strict=True)}
    env = DecoderEnv(device="cpu", dtype="float32", linear_kernels=(Counting,))
    fused = build_fused(weights, ["q", "k", "v"], env)
    x = random(3, 96, seed=1)
    Counting.products = 0
    torch.testing.assert_close(torch.cat(list(fused(x)), 1), F.linear(x, whole, biases))
    assert Counting.products == (1 if merged else 3)


def test_tensors_are_adjacent_only_row_after_row_in_one_storage() -> None:
    whole = random(12, 8)
    first, second, third = whole.split(4)
    joined = adjacent([first, second, third])
    assert joined is not None
    assert torch.equal(joined, whole)
    assert adjacent([first, third]) is None
    assert adjacent([second, first]) is None
    assert adjacent([first, second.clone()]) is None


class Foreign(WeightForm):
    """A form no kernel here knows."""

    @property
    def shape(self) -> tuple[int, ...]:
        return (4, 4)

    def dequantize(self) -> torch.Tensor:
        return torch.zeros(4, 4)

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Foreign:
        return self

    def take(self, rows: torch.Tensor) -> Foreign:
        return self


class Picky(LinearKernel):
    """Supports nothing, and says why."""

    name = "picky"

    @classmethod
    def supports(cls, form: WeightForm, env: LinearEnv) -> list[str]:
        return [f"not on a {env.device}"]

    def prepare(self, form: WeightForm, bias: torch.Tensor | None) -> None:
        raise AssertionError("an unsupported form is never prepared")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise AssertionError("an unsupported form is never computed")


def test_a_kernel_that_refuses_makes_way_for_the_plain_one() -> None:
    env = DecoderEnv(device="cpu", dtype="float32", linear_kernels=(Picky,))
    assert isinstance(build_linear({"o.weight": Dense(random(4, 4))}, "o", env), DenseLinear)


class Narrow(DenseLinear):
    """Forgets the last output."""

    name = "narrow"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x)[:, :-1]


class Wide(DenseLinear):
    """Another dtype than it was given."""

    name = "wide"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).double()


class Unprepared(DenseLinear):
    name = "unprepared"

    def prepare(self, form: WeightForm, bias: torch.Tensor | None) -> None:
        raise RuntimeError("out of tiles")


class Failing(DenseLinear):
    name = "failing"

    @classmethod
    def supports(cls, form: WeightForm, env: LinearEnv) -> list[str]:
        raise RuntimeError("no driver")


class Vague(DenseLinear):
    name = "vague"

    @classmethod
    def supports(cls, form: WeightForm, env: LinearEnv) -> Any:
        return None


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Narrow, "forward() of one row gave [1, 3], torch.float32, expected [1, 4], torch.float32"),
        (Wide, "forward() of one row gave [1, 4], torch.float64, expected [1, 4], torch.float32"),
        (Unprepared, "it raised RuntimeError: out of tiles"),
        (Failing, "it raised RuntimeError: no driver"),
        (Vague, "it raised TypeError: supports() returned None, no list of reasons"),
    ],
)
def test_a_defective_kernel_is_passed_over_with_the_reason(kind: type[LinearKernel], reason: str) -> None:
    choices: list[LinearChoice] = []
    env = DecoderEnv(device="cpu", dtype="float32", linear_kernels=(kind, Picky), on_linear=choices.append)
    assert type(build_linear({"o.weight": Dense(random(4, 8))}, "o", env)) is DenseLinear
    (choice,) = choices
    assert (choice.weight, choice.form, choice.kernel) == ("o", "Dense", DenseLinear)
    assert [(r.kernel, r.broken) for r in choice.refused] == [(kind, True), (Picky, False)]
    assert choice.refused[0].reasons == (reason,)


def test_a_form_nobody_computes_is_refused_with_every_reason() -> None:
    env = DecoderEnv(device="cpu", dtype="float32", linear_kernels=(Picky,))
    with pytest.raises(PluginError, match=r"Foreign.*picky: not on a cpu \| torch: weights held as Foreign"):
        make_kernel(Foreign(), None, env)
