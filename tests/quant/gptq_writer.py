"""A writer of GPTQ tensors in numpy, from the format's definition: the truth that the loader is held against."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

ORDERS = ("plain", "static", "act-order")


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """codes [in, out], zeros and scales [groups, out], g_idx [in]: w[n, k] = scale[g, n] * (code[k, n] - zero[g, n])."""

    codes: np.ndarray[Any, Any]
    zeros: np.ndarray[Any, Any]
    scales: torch.Tensor
    g_idx: np.ndarray[Any, Any]
    bits: int

    def dequantized(self) -> torch.Tensor:
        """float32 [out, in]."""
        steps = (self.codes - self.zeros[self.g_idx]).astype(np.float32)
        return torch.from_numpy(np.ascontiguousarray((self.scales.float().numpy()[self.g_idx] * steps).T))

    def stored(self, version: int) -> dict[str, torch.Tensor]:
        """qweight, qzeros, scales, g_idx as gptqmodel writes them."""
        zeros = self.zeros
        if self.bits == 3 and version == 1:
            zeros = (zeros - 1) % 8
        qzeros = stream(zeros.T, self.bits).T.copy()
        if self.bits != 3 and version == 1:
            qzeros -= np.uint32(sum(1 << at for at in range(0, 32, self.bits)))  # modulo 2**32
        return {
            "qweight": torch.from_numpy(stream(self.codes, self.bits).view(np.int32)),
            "qzeros": torch.from_numpy(qzeros.view(np.int32)),
            "scales": self.scales,
            "g_idx": torch.from_numpy(self.g_idx.astype(np.int32)),
        }


def stream(values: np.ndarray[Any, Any], bits: int) -> np.ndarray[Any, Any]:
    """[n, columns] -> uint32 [n * bits / 32, columns]: the bits of one value after another, low ones first."""
    count, columns = values.shape
    single = (values[:, None, :] >> np.arange(bits)[None, :, None]) & 1
    words = single.reshape(count * bits // 32, 32, columns).astype(np.uint32) << np.arange(
        32, dtype=np.uint32
    ).reshape(1, 32, 1)
    packed: np.ndarray[Any, Any] = np.bitwise_or.reduce(words, axis=1)
    return packed


def random_matrix(
    seed: int,
    outputs: int,
    inputs: int,
    *,
    bits: int,
    group: int,
    symmetric: bool,
    order: str = "plain",
    dtype: torch.dtype = torch.float16,
) -> Matrix:
    """All codes, zero points of 0 among them where they are not symmetric; one output is dead: its scales are 0."""
    random = np.random.default_rng(seed)
    size = inputs if group == -1 else group
    groups = -(-inputs // size)
    g_idx = np.arange(inputs) // size
    if order == "act-order":
        g_idx = random.permutation(g_idx)
    scales = torch.from_numpy(random.uniform(1e-4, 0.1, (groups, outputs)).astype(np.float32)).to(dtype)
    scales[:, 1] = 0.0
    zeros = (
        np.full((groups, outputs), 2 ** (bits - 1))
        if symmetric
        else random.integers(0, 2**bits, (groups, outputs))
    )
    return Matrix(
        codes=random.integers(0, 2**bits, (inputs, outputs)),
        zeros=zeros,
        scales=scales,
        g_idx=g_idx,
        bits=bits,
    )


def config_of(
    *, bits: int, group: int, symmetric: bool, order: str = "plain", version: int = 1
) -> dict[str, Any]:
    """``quantization_config`` as the tools write it."""
    return {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group,
        "sym": symmetric,
        "desc_act": order != "plain",
        "static_groups": order == "static",
        "checkpoint_format": "gptq" if version == 1 else "gptq_v2",
    }
