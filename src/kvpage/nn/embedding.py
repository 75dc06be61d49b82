"""Token embedding, with learned positions where a model has them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F

from kvpage.api.model import EmbeddingSpec
from kvpage.api.quant import Dense, WeightForm
from kvpage.nn.linear import dense


class Embedding:
    """token ids [T], positions [T] -> hidden [T, H], a new tensor that the caller may write.

    A quantized table stays as it is: rows are dequantized as they are looked up.
    """

    __slots__ = ("_dtype", "_offset", "_positions", "_scale", "_table")

    def __init__(self, spec: EmbeddingSpec, weights: Mapping[str, WeightForm], dtype: torch.dtype) -> None:
        """``dtype``: of hidden states; a plain table has it already."""
        self._table = weights["embed.weight"]
        self._dtype = dtype
        self._positions = None if spec.positions is None else dense(weights["positions.weight"])
        self._offset = spec.position_offset
        # Gemma multiplies by the scale as the model's dtype holds it.
        self._scale = float(torch.tensor(spec.scale, dtype=dtype, device="cpu"))

    def __call__(self, token_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        hidden = self._rows(token_ids)
        if self._scale != 1.0:
            hidden.mul_(self._scale)
        if self._positions is not None:
            hidden.add_(F.embedding(positions + self._offset, self._positions))
        return hidden

    def _rows(self, token_ids: torch.Tensor) -> torch.Tensor:
        if isinstance(self._table, Dense):
            return F.embedding(token_ids, self._table.tensor)
        # Each token once, however often a step has it.
        used, places = torch.unique(token_ids, return_inverse=True)
        return self._table.take(used).dequantize().to(self._dtype)[places]
