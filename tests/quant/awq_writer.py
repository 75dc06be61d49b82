"""A writer of AWQ tensors in numpy, index by index from the format's definition: the truth for the loader."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

LAYOUTS = ("gemm", "gemv", "gemv_fast")
ORDER = np.array([0, 2, 4, 6, 1, 3, 5, 7])
"""GEMM: nibble i of a word is column ORDER[i] of its eight."""


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """codes [out, in], zeros [out, groups], scales [out, groups]: w[n, k] = scale[n, g] * (code[n, k] - zero[n, g])."""

    codes: np.ndarray[Any, Any]
    zeros: np.ndarray[Any, Any]
    scales: torch.Tensor
    group: int

    @property
    def offsets(self) -> torch.Tensor:
        """What GEMV-fast stores instead of zero points: float16 [out, groups]."""
        return (-(self.scales.float() * torch.from_numpy(self.zeros).float())).half()

    def dequantized(self, layout: str) -> torch.Tensor:
        """float32 [out, in] as ``layout`` says it: GEMV-fast has rounded the product of scale and zero point."""
        groups = np.arange(self.codes.shape[1]) // self.group
        scales = self.scales.float()[:, groups]
        if layout == "gemv_fast":
            return torch.from_numpy(self.codes).float() * scales + self.offsets.float()[:, groups]
        return scales * torch.from_numpy(self.codes - self.zeros[:, groups]).float()

    def stored(self, layout: str) -> dict[str, torch.Tensor]:
        """qweight, qzeros, scales."""
        if layout == "gemm":
            return {
                "qweight": gemm_words(self.codes.T),
                "qzeros": gemm_words(self.zeros.T),
                "scales": self.scales.t().contiguous(),
            }
        words = padded_words(self.zeros.shape[1], self.group)
        scales = padded(self.scales, words * 8)
        if layout == "gemv":
            zeros = padded(torch.from_numpy(self.zeros), words * 8).numpy()
            return {"qweight": plain_words(self.codes), "qzeros": plain_words(zeros), "scales": scales}
        return {
            "qweight": fast_words(self.codes),
            "qzeros": padded(self.offsets, words * 8).t().contiguous(),
            "scales": scales.t().contiguous(),
        }


def padded_words(groups: int, group: int) -> int:
    multiple = {64: 2, 32: 4}.get(group, 1)
    return math.ceil(math.ceil(groups / 8) / multiple) * multiple


def padded(tensor: torch.Tensor, width: int) -> torch.Tensor:
    """With zeros on the right."""
    return torch.nn.functional.pad(tensor, (0, width - tensor.shape[1]))


def plain_words(values: np.ndarray[Any, Any]) -> torch.Tensor:
    """[rows, n] of 4 bits -> int32 [rows, n / 8], the first value in the lowest bits."""
    nibbles = values.reshape(values.shape[0], -1, 8).astype(np.uint32) << (4 * np.arange(8, dtype=np.uint32))
    return torch.from_numpy(np.bitwise_or.reduce(nibbles, axis=2).view(np.int32))


def gemm_words(values: np.ndarray[Any, Any]) -> torch.Tensor:
    """[rows, n] -> int32 [rows, n / 8]."""
    return plain_words(values.reshape(values.shape[0], -1, 8)[:, :, ORDER].reshape(values.shape))


def fast_words(codes: np.ndarray[Any, Any]) -> torch.Tensor:
    """[out, in] -> int16 [out / 4, in].

    Input 32 b + 8 a + 2 p + s stands at 32 b + 8 p + 4 s + a; of each 64 such places, t of output 4 m + r is nibble
    t % 4 of word 16 r + t // 4 of row m.
    """
    outputs, inputs = codes.shape
    k = np.arange(inputs)
    block, a, p, s = k // 32, k % 32 // 8, k % 8 // 2, k % 2
    place = 32 * block + 8 * p + 4 * s + a
    words = np.zeros((outputs // 4, inputs), dtype=np.uint16)
    for n in range(outputs):
        columns = 64 * (place // 64) + 16 * (n % 4) + place % 64 // 4
        np.bitwise_or.at(words[n // 4], columns, (codes[n] << (4 * (place % 4))).astype(np.uint16))
    return torch.from_numpy(words.view(np.int16))


def random_matrix(
    seed: int, outputs: int, inputs: int, *, group: int, dtype: torch.dtype = torch.float16
) -> Matrix:
    """All codes and zero points."""
    random = np.random.default_rng(seed)
    size = inputs if group == -1 else group
    scales = random.uniform(1e-4, 0.1, (outputs, inputs // size)).astype(np.float32)
    return Matrix(
        codes=random.integers(0, 16, (outputs, inputs)),
        zeros=random.integers(0, 16, (outputs, inputs // size)),
        scales=torch.from_numpy(scales).to(dtype),
        group=size,
    )


def config_of(*, layout: str, group: int) -> dict[str, Any]:
    """``quantization_config`` as AutoAWQ writes it."""
    return {
        "quant_method": "awq",
        "bits": 4,
        "group_size": group,
        "zero_point": True,
        "version": layout,
        "modules_to_not_convert": None,
    }
