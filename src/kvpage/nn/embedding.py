"""Token embedding, with learned positions where a model has them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F

from kvpage.api.model import EmbeddingSpec
from kvpage.api.quant import WeightForm
from kvpage.nn.linear import dense


class Embedding:
    """token ids [T], positions [T] -> hidden [T, H], a new tensor that the caller may write."""

    __slots__ = ("_offset", "_positions", "_scale", "_table")

    def __init__(self, spec: EmbeddingSpec, weights: Mapping[str, WeightForm]) -> None:
        self._table = dense(weights["embed.weight"])
        self._positions = None if spec.positions is None else dense(weights["positions.weight"])
        self._offset = spec.position_offset
        # Gemma multiplies by the scale as the model's dtype holds it.
        self._scale = float(torch.tensor(spec.scale, dtype=self._table.dtype, device="cpu"))

    def __call__(self, token_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        hidden = F.embedding(token_ids, self._table)
        if self._scale != 1.0:
            hidden.mul_(self._scale)
        if self._positions is not None:
            hidden.add_(F.embedding(positions + self._offset, self._positions))
        return hidden
