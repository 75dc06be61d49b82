"""Native products of quantized weights, for models that run layer by layer in torch."""

from __future__ import annotations

import ctypes
from typing import ClassVar

import torch

from kvpage.api.quant import Dense, LinearEnv, LinearKernel, WeightForm
from kvpage.errors import KvpageError
from kvpage_cpu.native import open_library
from kvpage_cpu.packing import PLAIN, context_for, pack, why_not

DTYPES = ("float32", "bfloat16")


class CpuLinear(LinearKernel):
    """x @ weight.T + bias of a packed weight, in panels of its own: the form it is made from is not kept."""

    name: ClassVar[str] = "cpu"
    __slots__ = ("_context", "_outputs", "_packed")

    @classmethod
    def supports(cls, form: WeightForm, env: LinearEnv) -> list[str]:
        reasons = []
        if isinstance(form, Dense):
            reasons.append("plain weights, which are computed where they lie")
        if env.device != "cpu":
            reasons.append(f"device {env.device} (has cpu)")
        if env.dtype not in DTYPES:
            reasons.append(f"dtype {env.dtype} (has {', '.join(DTYPES)})")
        try:
            open_library()
        except KvpageError as error:
            reasons.append(str(error))
        return reasons or why_not(form)

    def prepare(self, form: WeightForm, bias: torch.Tensor | None) -> None:
        self._context = context_for([form], self.env.dtype)
        self._packed = pack(self._context, form, bias, exact=self.env.dtype == "float32")
        self._outputs = form.shape[0]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = x.new_empty((x.shape[0], self._outputs))
        if x.shape[0] == 0:
            return out
        if x.stride(1) != 1:
            x = x.contiguous()
        context, kind = self._context, PLAIN[x.dtype]
        context.check(
            context.library.kvp_linear(
                context.handle,
                ctypes.byref(self._packed.struct),
                x.shape[0],
                x.data_ptr(),
                kind,
                x.stride(0),
                out.data_ptr(),
                kind,
                out.stride(0),
            )
        )
        return out
