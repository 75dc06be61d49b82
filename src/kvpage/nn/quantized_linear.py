"""Linear layers of quantized weights: one that computes from int8 codes, and one that computes any form."""

from __future__ import annotations

from typing import ClassVar

import torch

from kvpage.api.quant import ChannelInt8, Dense, LinearEnv, LinearKernel, WeightForm
from kvpage.nn.linear import DenseLinear, RowProduct

BLOCK_BYTES = 2 * 2**20
"""Codes are converted in blocks of this size, which are multiplied while they are in the cache."""


class Int8Linear(LinearKernel):
    """x @ codes.T * scales + bias: the codes become x's dtype block by block, x stays as it is.

    The codes are exact in bfloat16 and float32 and are scaled after the product; float16 could overflow there, so
    its weights are scaled before. Time against ``DenseLinear`` of bfloat16 weights, one Zen 4 thread, matrices of
    4 to 12 million weights: 1.5 to 1.9 of it for 1 row, 1.2 to 1.5 for 32, 1.1 to 1.2 for 256 (float32: 1.0 to 1.3).
    ``torch._weight_int8pack_mm`` takes 0.4, 1.8 and 3 times that of bfloat16; it is not used because a row must
    have the same bits among any number of rows, so one way has to serve all of them.
    """

    name: ClassVar[str] = "int8"
    __slots__ = ("_bias", "_codes", "_product", "_rows_at_once", "_scales")

    @classmethod
    def supports(cls, form: WeightForm, env: LinearEnv) -> list[str]:
        reasons = []
        if not isinstance(form, ChannelInt8):
            reasons.append(f"weights held as {type(form).__name__} (has ChannelInt8)")
        if env.dtype not in ("float32", "bfloat16", "float16"):
            reasons.append(f"dtype {env.dtype} (has bfloat16, float16, float32)")
        return reasons

    def prepare(self, form: WeightForm, bias: torch.Tensor | None) -> None:
        if not isinstance(form, ChannelInt8):
            raise TypeError(f"Int8Linear computes ChannelInt8 weights, not {type(form).__name__}")
        self._codes = form.codes
        self._scales = form.scales if form.factor == 1.0 else form.scales * form.factor
        self._bias = bias
        dtype: torch.dtype = getattr(torch, self.env.dtype)
        self._product = RowProduct(form.codes.device.type, dtype)
        self._rows_at_once = max(64, BLOCK_BYTES // (max(1, form.shape[1]) * dtype.itemsize))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows, outputs = x.shape[0], self._codes.shape[0]
        out = x.new_empty((rows, outputs))
        if rows == 0:
            return out
        before = x.dtype == torch.float16
        x = self._product.pad(x)
        scratch = x.new_empty((min(self._rows_at_once, outputs), x.shape[1]))
        for start in range(0, outputs, self._rows_at_once):
            stop = min(start + self._rows_at_once, outputs)
            codes, scales = self._codes[start:stop], self._scales[start:stop]
            weight = scratch[: stop - start]
            if before:
                torch.mul(codes, scales.unsqueeze(1), out=weight)
                out[:, start:stop] = self._product(x, weight, None)[:rows]
            else:
                weight.copy_(codes)
                torch.mul(self._product(x, weight, None)[:rows], scales, out=out[:, start:stop])
        return out if self._bias is None else out.add_(self._bias)


class DequantizeLinear(DenseLinear):
    """Any form, computed as the plain numbers it stands for.

    The weight exists a second time, in the model's dtype and outside the engine's arena: the loader therefore holds
    weights that no other kernel computes as plain numbers, and this one is left with weights that a kernel supports
    and then fails on.
    """

    name: ClassVar[str] = "dequantize"
    keeps_form: ClassVar[bool] = False
    __slots__ = ()

    @classmethod
    def supports(cls, form: WeightForm, env: LinearEnv) -> list[str]:
        return ["plain weights, which are computed where they lie"] if isinstance(form, Dense) else []

    def prepare(self, form: WeightForm, bias: torch.Tensor | None) -> None:
        super().prepare(Dense(form.dequantize().to(getattr(torch, self.env.dtype))), bias)
