"""Random weights of every form that the native kernels compute, for tests of products."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

from kvpage.api.quant import ChannelInt8, Codebook, Dense, Fp8, GroupedInt, WeightForm


def _dense(dtype: torch.dtype) -> Callable[..., WeightForm]:
    def make(random: torch.Generator, outputs: int, inputs: int) -> WeightForm:
        return Dense(torch.randn(outputs, inputs, generator=random).to(dtype))

    return make


def _channel(**options: Any) -> Callable[..., WeightForm]:
    def make(random: torch.Generator, outputs: int, inputs: int) -> WeightForm:
        codes = torch.randint(-128, 128, (outputs, inputs), generator=random, dtype=torch.int8)
        return ChannelInt8(codes=codes, scales=torch.rand(outputs, generator=random) + 0.5, **options)

    return make


def _grouped(
    bits: int = 4,
    group: int = 64,
    scales: torch.dtype = torch.bfloat16,
    *,
    zero: int | None = None,
    zeros: torch.dtype | None = None,
    offsets: bool = False,
    shared: int = 0,
    permuted: bool = False,
    dynamic: bool = False,
) -> Callable[..., WeightForm]:
    """``group`` 0: the whole row. ``shared``: groups to a super-scale, of scales of the dtype ``scales``."""

    def make(random: torch.Generator, outputs: int, inputs: int) -> WeightForm:
        size = group or inputs
        sizes = (outputs, inputs // size)

        def numbers() -> torch.Tensor:
            if shared:
                low = -128 if scales is torch.int8 else 0
                return torch.randint(low, low + 256, sizes, generator=random).to(scales)
            return torch.randn(sizes, generator=random).to(scales)

        def supers() -> torch.Tensor:
            return (torch.randn(outputs, sizes[1] // shared, generator=random) / 256).half()

        form = GroupedInt(
            codes=torch.randint(0, 256, (outputs, inputs * bits // 8), generator=random, dtype=torch.uint8),
            scales=numbers(),
            group=size,
            bits=bits,
            zero=2 ** (bits - 1) if zero is None else zero,
            offsets=numbers() if offsets else None,
            super_scales=supers() if shared else None,
            super_offsets=supers() if shared and offsets else None,
            activation="per-group" if dynamic else "none",
        )
        if zeros is not None:
            drawn = torch.randint(0, 2**bits + 1, sizes, generator=random)
            form = replace(form, zeros=drawn.clamp(max=torch.iinfo(zeros).max).to(zeros))
        if permuted:
            form = replace(form, permutation=torch.randperm(inputs, generator=random).int())
        return form

    return make


def _codebook(group: int) -> Callable[..., WeightForm]:
    def make(random: torch.Generator, outputs: int, inputs: int) -> WeightForm:
        return Codebook(
            codes=torch.randint(0, 256, (outputs, inputs // 2), generator=random, dtype=torch.uint8),
            scales=torch.rand(outputs, inputs // group, generator=random),
            table=torch.linspace(-1, 1, 16) ** 3,
            group=group,
        )

    return make


def _fp8(group: int, largest: float = 2.1) -> Callable[..., WeightForm]:
    """Sizes from subnormal numbers up to 10**largest."""

    def make(random: torch.Generator, outputs: int, inputs: int) -> WeightForm:
        size = group or inputs
        numbers = torch.randn(outputs, inputs, generator=random) * torch.logspace(-3, largest, inputs)
        return Fp8(
            codes=numbers.clamp(-448, 448).to(torch.float8_e4m3fn),
            scales=torch.rand(outputs, -(-inputs // size), generator=random) + 0.1,
            group=size,
        )

    return make


MAKERS: Mapping[str, Callable[..., WeightForm]] = {
    "float32": _dense(torch.float32),
    "bfloat16": _dense(torch.bfloat16),
    "int8": _channel(factor=1 / 127),
    "int8-per-token": _channel(activation="per-token"),
    "int4": _grouped(),
    "int4-offsets": _grouped(offsets=True),
    "int4-zeros-of-32": _grouped(group=32, scales=torch.float16, zeros=torch.uint8),
    "int4-any-zero": _grouped(group=128, scales=torch.float32, zero=3),
    "int4-of-16-super-scales": _grouped(group=16, scales=torch.uint8, offsets=True, shared=4),
    "int4-permuted-row": _grouped(group=0, scales=torch.float16, permuted=True),
    "int4-of-96": _grouped(group=96, offsets=True, scales=torch.float32),
    "int4-per-group": _grouped(dynamic=True),
    "int4-per-group-float16": _grouped(dynamic=True, group=128, scales=torch.float16, permuted=True),
    "int4-per-group-zeros": _grouped(dynamic=True, scales=torch.float16, zeros=torch.uint8),
    "int4-per-group-super-scales": _grouped(dynamic=True, group=32, scales=torch.uint8, offsets=True, shared=2),
    "int8-of-16-super-scales": _grouped(8, 16, torch.int8, zero=32, shared=12),
    "int8-of-32": _grouped(8, 32, torch.float16),
    "int8-of-128-zeros": _grouped(8, 64, torch.float32, zeros=torch.int16, permuted=True),
    "int8-row-offsets": _grouped(8, 0, offsets=True),
    "codebook-of-64": _codebook(64),
    "codebook-of-16": _codebook(16),
    "fp8": _fp8(0),
    "fp8-blocks": _fp8(128),
    "fp8-subnormal": _fp8(0, -2.5),
}  # fmt: skip
"""Name -> form(random, outputs, inputs); inputs are a multiple of 384."""

PADDED = ("float32", "bfloat16", "int8", "int8-per-token", "int8-row-offsets", "fp8", "fp8-blocks")
"""Those whose rows may be of any length; of 4 bits, of any even one: "int4-permuted-row"."""


def form_of(kind: str, outputs: int, inputs: int) -> WeightForm:
    """The weight of that kind and shape, always the same."""
    return MAKERS[kind](torch.Generator().manual_seed(len(kind) + inputs), outputs, inputs)


def as_computed(x: torch.Tensor, form: WeightForm) -> torch.Tensor:
    """x as the form has it computed: itself, or in 8 bits with a scale a row or group."""
    if getattr(form, "activation", "none") == "none":
        return x.double()
    order = getattr(form, "permutation", None)
    ordered = x if order is None else x[:, order.long()]
    width = form.group if isinstance(form, GroupedInt) else x.shape[1]
    parts = ordered.reshape(len(x), -1, width)
    scale = parts.abs().amax(-1, keepdim=True) / 127
    codes = (parts / scale.clamp(min=1e-30)).round()
    values = (codes.double() * scale.double()).view_as(x)
    return values if order is None else torch.empty_like(values).index_copy_(1, order.long(), values)
