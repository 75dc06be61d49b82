"""The conformance suite of linear kernels.

Subclass it in your tests, name your class, run pytest::

    from kvpage.testing.linear_kernels import LinearKernelConformance
    from mychip import MyInt8Linear

    class TestMyInt8Linear(LinearKernelConformance):
        kernel = MyInt8Linear

The truth is the float64 product with ``form.dequantize()``. What ``supports`` refuses is skipped, with its reasons.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch

from kvpage.api.quant import (
    ChannelInt8,
    Codebook,
    Dense,
    Fp8,
    GroupedInt,
    LinearEnv,
    LinearKernel,
    WeightForm,
)  # fmt: skip
from kvpage.testing.comparing import require, require_close, require_equal
from kvpage.testing.suite import ConformanceSuite, not_claimed

SHAPES = ((1, 1), (7, 5), (33, 17), (64, 48), (40, 100), (130, 256), (96, 1536))
"""[out, in] of the default samples: odd, whole vectors, more than one block, long sums."""


GROUPED_SHAPES = (
    (1, 32, 32),
    (7, 64, 32),
    (33, 192, 64),
    (40, 128, 128),
    (130, 384, 128),
    (65, 96, 96),
    (5, 10, 2),
)
"""[out, in, group] of the default samples: one group and several, groups that are the whole row, odd outputs."""


class ForeignForm(WeightForm):
    """A form that no kernel has heard of; a kernel that takes every form can compute it from ``dequantize``."""

    def __init__(self, values: torch.Tensor) -> None:
        self._values = values

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self._values.shape)

    def dequantize(self) -> torch.Tensor:
        return self._values.float().clone()

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> ForeignForm:
        return ForeignForm(change(self._values))

    def take(self, rows: torch.Tensor) -> ForeignForm:
        return ForeignForm(self._values[rows])


@functools.cache
def sample_forms() -> Mapping[str, WeightForm]:
    """Forms that kvpage has, by name, in odd shapes."""
    generator = torch.Generator(device="cpu").manual_seed(0)
    forms: dict[str, WeightForm] = {}
    for outputs, inputs in SHAPES:
        codes = torch.randint(-128, 128, (outputs, inputs), generator=generator, device="cpu")
        scales = torch.rand(outputs, generator=generator, device="cpu") * 0.02
        forms[f"Dense-{outputs}x{inputs}"] = Dense(
            torch.randn(outputs, inputs, generator=generator, device="cpu")
        )
        forms[f"ChannelInt8-{outputs}x{inputs}"] = ChannelInt8(codes=codes.to(torch.int8), scales=scales)
    forms["Dense-64x48-transposed"] = Dense(torch.randn(48, 64, generator=generator, device="cpu").t())
    largest = torch.full((3, 2048), 127, dtype=torch.int8, device="cpu")
    tiny = torch.tensor([1e-3, 0.0, 1e-6], device="cpu")
    forms["ChannelInt8-largest-codes"] = ChannelInt8(codes=largest, scales=tiny)
    for outputs, inputs, group in GROUPED_SHAPES:
        name = f"GroupedInt-4-bit-{outputs}x{inputs}-groups-of-{group}"
        forms[name] = _grouped(outputs, inputs, group, generator)
        forms[f"{name}-offsets"] = _grouped(outputs, inputs, group, generator, offsets=True)
    forms["GroupedInt-8-bit-33x192-groups-of-32"] = _grouped(33, 192, 32, generator, bits=8, offsets=True)
    float16 = _grouped(19, 128, 64, generator, offsets=True)
    forms["GroupedInt-float16-scales"] = float16.map(
        lambda tensor: tensor.half() if tensor.is_floating_point() else tensor
    )
    largest = torch.zeros((3, 1024), dtype=torch.uint8, device="cpu")
    signs = torch.tensor([[1e-3], [-1e-3], [0.0]], device="cpu").expand(3, 16)
    forms["GroupedInt-largest-codes"] = GroupedInt(codes=largest, scales=signs.bfloat16(), group=128)
    return {**forms, **_forms_of_checkpoints(generator)}


def _forms_of_checkpoints(generator: torch.Generator) -> dict[str, WeightForm]:
    """What only files hold: zeros, act-order, super-scales, 8 bits in groups, tables of values, 8-bit floats."""

    def integers(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=generator, device="cpu")

    def numbers(*shape: int) -> torch.Tensor:
        return (torch.rand(shape, generator=generator, device="cpu") + 0.5).mul(0.02)

    def grouped(bits: int, outputs: int, inputs: int, group: int, **options: Any) -> GroupedInt:
        codes = integers(0, 256, outputs, inputs * bits // 8).to(torch.uint8)
        scales = options.pop("scales", None)
        if scales is None:
            scales = numbers(outputs, inputs // group).half()
        options.setdefault("zero", 2 ** (bits - 1))
        return GroupedInt(codes=codes, scales=scales, group=group, bits=bits, **options)

    order = torch.randperm(192, generator=generator, device="cpu").int()
    return {
        "ChannelInt8-factor": ChannelInt8(
            codes=integers(-127, 128, 9, 64).to(torch.int8), scales=numbers(9) * 100, factor=1 / 127
        ),
        "GroupedInt-zeros": grouped(4, 33, 256, 32, zeros=integers(0, 17, 33, 8).to(torch.uint8)),
        "GroupedInt-any-zero": grouped(4, 5, 96, 96, zero=3, scales=numbers(5, 1)),
        "GroupedInt-permuted": grouped(4, 17, 192, 64, permutation=order),
        "GroupedInt-super-scales": grouped(
            4, 35, 512, 32, zero=0,
            scales=integers(0, 64, 35, 16).to(torch.uint8), super_scales=numbers(35, 2).half() / 16,
            offsets=integers(0, 64, 35, 16).to(torch.uint8), super_offsets=numbers(35, 2).half() / -2,
        ),
        "GroupedInt-8-bit-super-scales": grouped(
            8, 33, 512, 16, zero=32,
            scales=integers(-128, 128, 33, 32).to(torch.int8), super_scales=numbers(33, 2).half() / 128,
        ),
        "GroupedInt-8-bit-zeros": grouped(8, 7, 128, 128, zeros=integers(0, 257, 7, 1).to(torch.int16)),
        "GroupedInt-8-bit-row": grouped(8, 7, 100, 100, permutation=order[order < 100]),
        "Codebook": Codebook(
            codes=integers(0, 256, 33, 96).to(torch.uint8), scales=numbers(33, 3), group=64,
            table=torch.linspace(-1, 1, 16, device="cpu") ** 3,
        ),
        "Fp8": Fp8(codes=_float8(generator, 33, 77), scales=numbers(33, 1), group=77),
        "Fp8-blocks": Fp8(codes=_float8(generator, 5, 200), scales=numbers(5, 2), group=128),
    }  # fmt: skip


def _float8(generator: torch.Generator, outputs: int, inputs: int) -> torch.Tensor:
    """Of every size: subnormal numbers too."""
    sizes = torch.logspace(-3, 2, inputs, device="cpu")
    numbers = torch.randn((outputs, inputs), generator=generator, device="cpu") * sizes
    return numbers.clamp(-448, 448).to(torch.float8_e4m3fn)


def _grouped(
    outputs: int, inputs: int, group: int, generator: torch.Generator, *, bits: int = 4, offsets: bool = False
) -> GroupedInt:
    """Random codes; scales and offsets are numbers of bfloat16."""
    codes = torch.randint(0, 256, (outputs, inputs * bits // 8), generator=generator, device="cpu")
    groups = (outputs, inputs // group)
    scales, added = (
        (torch.rand(groups, generator=generator, device="cpu") - 0.2).mul(0.02).bfloat16() for _ in range(2)
    )
    return GroupedInt(
        codes=codes.to(torch.uint8),
        scales=scales,
        group=group,
        bits=bits,
        zero=2 ** (bits - 1),
        offsets=added if offsets else None,
    )


class LinearKernelConformance(ConformanceSuite):
    """Subclass it, set ``kernel``.

    Attributes:
        kernel: the class under test.
        device: torch device string. dtypes: of x, narrowed where a machine is slow.
        tolerances: dtype -> difference allowed, as a share of sum(|x| * |weight|) + |bias|.
        row_independent: a row's output has the same bits whatever rows are beside it. ``False`` if the kernel does
            not promise that; its documentation should then say so, since sampled text may depend on load.
    """

    kernel: ClassVar[type[LinearKernel]]
    device: ClassVar[str] = "cpu"
    dtypes: ClassVar[Sequence[str]] = ("float32", "bfloat16", "float16")
    tolerances: ClassVar[Mapping[str, float]] = {"float32": 2e-5, "bfloat16": 8e-3, "float16": 1.5e-3}
    row_independent: ClassVar[bool] = True

    def forms(self) -> Mapping[str, WeightForm]:
        """Name -> form that the kernel is tried with; a plugin's own forms go here."""
        return sample_forms()

    def axes(self) -> dict[str, Sequence[Any]]:
        taken = [
            name
            for name in self.forms()
            if any(not self._reasons(self._form(name, d), d) for d in self.dtypes)
        ]
        return {"form": taken, "dtype": list(self.dtypes)}

    def test_supports_something(self) -> None:
        """At least one of the forms is taken, in one of the dtypes."""
        refused = {name: self._reasons(self._form(name, d), d) for name in self.forms() for d in self.dtypes}
        some = next(iter(refused.items()), ("no form", []))
        require(
            any(not reasons for reasons in refused.values()),
            "supports",
            f"every form is refused; {some[0]}: {'; '.join(some[1])}",
        )

    def test_refusals_have_reasons(self) -> None:
        """``supports`` answers with sentences, of forms and dtypes it has never heard of too."""
        foreign = ForeignForm(torch.ones(4, 4, device="cpu"))
        forms = {**self.forms(), "a form it has never heard of": foreign}
        for name, form in forms.items():
            for dtype in (*self.dtypes, "a dtype it has never heard of"):
                reasons = self.kernel.supports(form, LinearEnv(device=self._kind, dtype=dtype))
                good = isinstance(reasons, list) and all(isinstance(r, str) and r.strip() for r in reasons)
                require(
                    good,
                    "reasons",
                    f"supports() of {name} in {dtype} gave {reasons!r}, expected a list of sentences",
                )

    def test_unknown_forms_are_refused_or_computed(self) -> None:
        """What ``supports`` takes is computed right, also where the kernel did not look at what it is."""
        form = ForeignForm(torch.randn(6, 4, generator=_generator(3), device="cpu"))
        if not self._reasons(form, self.dtypes[0]):
            self._check(
                "unknown form",
                self._prepared(form, None, self.dtypes[0]),
                form,
                None,
                self._x(3, 4, self.dtypes[0]),
            )

    def test_output_equals_the_float64_product(self, form: str, dtype: str) -> None:
        """x @ dequantize().T, for one row, for several, and for x that is all ones."""
        weight = self._form(form, dtype)
        kernel = self._prepared(weight, None, dtype)
        for rows in (1, 2, 19):
            self._check("product", kernel, weight, None, self._x(rows, weight.shape[1], dtype))
        ones = torch.ones(3, weight.shape[1], dtype=getattr(torch, dtype), device=self.device)
        self._check("product of large sums", kernel, weight, None, ones)

    def test_bias_is_added(self, form: str, dtype: str) -> None:
        """One value an output, after the weight's scale."""
        weight = self._form(form, dtype)
        bias = self._x(1, weight.shape[0], dtype, seed=5)[0] * 4.0
        before = bias.clone()
        kernel = self._prepared(weight, bias, dtype)
        for rows in (1, 4):
            self._check("bias", kernel, weight, bias, self._x(rows, weight.shape[1], dtype))
        require_equal("bias is only read", bias, before, ("output",))

    def test_no_rows(self, form: str, dtype: str) -> None:
        """x [0, in] gives [0, out] of x's dtype, with bias too."""
        weight = self._form(form, dtype)
        for bias in (None, self._x(1, weight.shape[0], dtype)[0]):
            out = self._prepared(weight, bias, dtype).forward(self._x(0, weight.shape[1], dtype))
            expected = torch.empty(0, weight.shape[0], dtype=getattr(torch, dtype), device=self.device)
            require_equal("no rows", out, expected, ("row", "output"))

    def test_strided_input(self, form: str, dtype: str) -> None:
        """x may be a view: columns of a wider tensor, every other row, a transposed one, one row repeated."""
        weight = self._form(form, dtype)
        kernel, inputs = self._prepared(weight, None, dtype), weight.shape[1]
        wide = self._x(12, 2 * inputs + 3, dtype)
        views = {
            "columns of a wider tensor": wide[:, 3 : 3 + inputs],
            "every other row": wide[::2, :inputs],
            "transposed": self._x(inputs, 5, dtype).t(),
            "one row repeated": wide[:1, :inputs].expand(4, inputs),
        }
        for name, view in views.items():
            self._check(f"strided x ({name})", kernel, weight, None, view)

    def test_input_and_form_are_only_read(self, form: str, dtype: str) -> None:
        """Neither x nor a tensor of the form changes: a form may be shared (a tied head)."""
        weight = self._form(form, dtype)
        before = [tensor.clone() for tensor in weight.tensors()]
        kernel = self._prepared(weight, self._x(1, weight.shape[0], dtype)[0], dtype)
        x = self._x(5, weight.shape[1], dtype)
        kept = x.clone()
        kernel.forward(x)
        require_equal("x is only read", x, kept, ("row", "input"))
        for index, (tensor, old) in enumerate(zip(weight.tensors(), before, strict=True)):
            axes = [f"tensor {index} of the form, dimension {d}" for d in range(old.dim())]
            require_equal("the form is only read", tensor, old, axes)

    def test_output_is_new_memory(self, form: str, dtype: str) -> None:
        """What a call returned stays as it is when the next call returns; the caller may write into it."""
        weight = self._form(form, dtype)
        kernel = self._prepared(weight, None, dtype)
        x = self._x(3, weight.shape[1], dtype)
        first = kernel.forward(x)
        kept = first.clone()
        kernel.forward(self._x(3, weight.shape[1], dtype, seed=9))
        require_equal("output is new memory", first, kept, ("row", "output"))
        first.fill_(torch.nan)
        require_equal("output is new memory", kernel.forward(x), kept, ("row", "output"))

    def test_row_has_the_same_bits_in_any_batch(self, form: str, dtype: str) -> None:
        """1 to 40 rows and some more, wherever the row stands. Not asked where ``row_independent = False``."""
        if not self.row_independent:
            not_claimed(f"{self.kernel.__name__} sets row_independent = False")
        weight = self._form(form, dtype)
        kernel = self._prepared(weight, None, dtype)
        x = self._x(300, weight.shape[1], dtype)
        together = kernel.forward(x)
        for rows in (*range(1, 41), 63, 64, 65, 128, 129, 257):
            note = f"{rows} rows against 300"
            require_equal(
                "row independence", kernel.forward(x[:rows]), together[:rows], ("row", "output"), note
            )
        require_equal(
            "row independence",
            kernel.forward(x[171:174]),
            together[171:174],
            ("row", "output"),
            "rows 171 to 173 of 300",
        )

    def test_rows_do_not_reach_each_other(self, form: str, dtype: str) -> None:
        """NaN in one row stays in that row."""
        weight = self._form(form, dtype)
        kernel = self._prepared(weight, None, dtype)
        x = self._x(6, weight.shape[1], dtype)
        expected = kernel.forward(x)
        x[2] = torch.nan
        out = kernel.forward(x)
        keep = torch.tensor([0, 1, 3, 4, 5], device=self.device)
        require_equal("a row stays alone", out[keep], expected[keep], ("row", "output"), "row 2 of 6 was NaN")

    def test_kernels_do_not_disturb_one_another(self, dtype: str) -> None:
        """Two kernel objects side by side, of different weights."""
        names = [name for name in self.forms() if not self._reasons(self._form(name, dtype), dtype)]
        if not names:
            not_claimed(f"{self.kernel.__name__} takes no form in {dtype}")
        forms = [self._form(names[0], dtype), self._form(names[-1], dtype)]
        kernels = [self._prepared(form, None, dtype) for form in forms]
        for form, kernel in (*zip(forms, kernels, strict=True), *zip(forms, kernels, strict=True)):
            self._check("two kernels", kernel, form, None, self._x(4, form.shape[1], dtype))

    def _check(
        self,
        property: str,
        kernel: LinearKernel,
        form: WeightForm,
        bias: torch.Tensor | None,
        x: torch.Tensor,
    ) -> None:
        __tracebackhide__ = True
        out = kernel.forward(x)
        require(out.dtype == x.dtype, property, f"output is {out.dtype}, x is {x.dtype}")
        require(out.device == x.device, property, f"output is on {out.device}, x on {x.device}")
        exact, weight = x.cpu().double(), form.dequantize().cpu().double()
        expected, size = exact @ weight.t(), exact.abs() @ weight.abs().t()
        if bias is not None:
            expected, size = expected + bias.cpu().double(), size + bias.cpu().double().abs()
        dtype = str(x.dtype).removeprefix("torch.")
        allowed = self.tolerances.get(dtype, 8e-3) * size + 1e-30
        require_close(
            property,
            out,
            expected,
            allowed,
            ("row", "output"),
            f"{type(form).__name__} {list(form.shape)}, {dtype}",
        )

    def _form(self, name: str, dtype: str) -> WeightForm:
        """The form of that name on the suite's device; plain weights have x's dtype."""
        form = self.forms()[name]
        if isinstance(form, Dense):
            return Dense(form.tensor.to(device=self.device, dtype=getattr(torch, dtype), copy=True))
        return form.map(lambda tensor: tensor.to(self.device, copy=True))

    def _prepared(self, form: WeightForm, bias: torch.Tensor | None, dtype: str) -> LinearKernel:
        reasons = self._reasons(form, dtype)
        if reasons:
            not_claimed(f"{self.kernel.__name__} does not take it: {'; '.join(reasons)}")
        kernel = self.kernel(LinearEnv(device=self._kind, dtype=dtype))
        kernel.prepare(form, bias)
        return kernel

    def _reasons(self, form: WeightForm, dtype: str) -> list[str]:
        return self.kernel.supports(form, LinearEnv(device=self._kind, dtype=dtype))

    def _x(self, rows: int, inputs: int, dtype: str, seed: int = 1) -> torch.Tensor:
        x = torch.randn(rows, inputs, generator=_generator(seed), device="cpu")
        return x.to(device=self.device, dtype=getattr(torch, dtype))

    @property
    def _kind(self) -> str:
        return torch.device(self.device).type


def _generator(seed: int) -> torch.Generator:
    return torch.Generator(device="cpu").manual_seed(seed)
