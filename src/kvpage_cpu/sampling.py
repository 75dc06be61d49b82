"""Tokens from logits in native code: csrc/sampling.cpp behind ``kvpage.api.sampling``.

Per row: one pass for the largest logit, one for the weights, and a radix selection of the threshold among the few
weights that a cheap bound leaves; rows go to the threads of the context's team. On one thread of a Zen 4 core a row of
32,000 float32 takes 2 us greedy and 17 to 42 us drawn, whatever is asked for (torch kernel: 12, and 95 to 390).
"""

from __future__ import annotations

import ctypes
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from kvpage.api.sampling import SamplingEnv, SamplingKernel, Shaping
from kvpage_cpu.native import Context
from kvpage_cpu.structs import BF16, F32, KvpSampling

Int64Array: TypeAlias = npt.NDArray[np.int64]
Float32Array: TypeAlias = npt.NDArray[np.float32]

_TYPES = {torch.float32: F32, torch.bfloat16: BF16}


class CpuSampling(SamplingKernel):
    """float32 and bfloat16 logits as they are; others are converted to float32.

    Args:
        context: ``None``: one of its own.

    Raises:
        NativeLibraryError, ConfigError: as ``Context``.
    """

    def __init__(self, env: SamplingEnv, context: Context | None = None) -> None:
        super().__init__(env)
        self._context = Context() if context is None else context
        self._run = self._context.library.kvp_sample
        self._call = KvpSampling()

    def likeliest(self, logits: torch.Tensor) -> Int64Array:
        self._call.temperature = None
        return self._tokens(logits)

    def draw(self, logits: torch.Tensor, shaping: Shaping, uniforms: Float32Array) -> Int64Array:
        columns = (
            np.ascontiguousarray(shaping.temperature, np.float32),
            np.ascontiguousarray(shaping.top_k, np.int64),
            np.ascontiguousarray(shaping.top_p, np.float64),
            np.ascontiguousarray(shaping.min_p, np.float32),
            np.ascontiguousarray(uniforms, np.float32),
        )
        call = self._call
        call.temperature, call.top_k, call.top_p, call.min_p, call.uniforms = [_address(c) for c in columns]
        return self._tokens(logits)

    def _tokens(self, logits: torch.Tensor) -> Int64Array:
        if logits.dtype not in _TYPES:
            logits = logits.float()
        if logits.stride(1) != 1:
            logits = logits.contiguous()
        token_ids = np.empty(len(logits), dtype=np.int64)
        call = self._call
        call.type = _TYPES[logits.dtype]
        call.num_rows, call.vocab_size = logits.shape
        call.logits, call.logits_stride = logits.data_ptr(), logits.stride(0)
        call.token_ids = _address(token_ids)
        self._context.check(self._run(self._context.handle, ctypes.byref(call)))
        return token_ids


def _address(array: npt.NDArray[Any]) -> int:
    address: int = array.__array_interface__["data"][0]  # half the time of array.ctypes.data
    return address
