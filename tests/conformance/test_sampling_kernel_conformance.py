"""The torch sampling kernel passes the suite of sampling kernels, which finds the mistakes planted here."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from planted import finds

from kvpage.api.sampling import Shaping
from kvpage.sample.draw import TorchSampling
from kvpage.testing.sampling_kernels import SamplingKernelConformance


class TestTorchSampling(SamplingKernelConformance):
    kernel = TorchSampling


class LastOfTies(TorchSampling):
    def likeliest(self, logits: torch.Tensor) -> Any:
        flipped = super().likeliest(logits.flip(-1))
        return np.where(flipped < 0, flipped, logits.shape[-1] - 1 - flipped)


class WritesIntoLogits(TorchSampling):
    def likeliest(self, logits: torch.Tensor) -> Any:
        found = super().likeliest(logits)
        logits.clamp_(min=-1.0)
        return found


class NarrowTokens(TorchSampling):
    def likeliest(self, logits: torch.Tensor) -> Any:
        return super().likeliest(logits).astype(np.int32)


class OneBuffer(TorchSampling):
    buffer = np.empty(1000, np.int64)

    def likeliest(self, logits: torch.Tensor) -> Any:
        found = self.buffer[: len(logits)]
        found[:] = super().likeliest(logits)
        return found


class TakesNaN(TorchSampling):
    def likeliest(self, logits: torch.Tensor) -> Any:
        return super().likeliest(logits.nan_to_num(nan=9.0))


class BreaksTies(TorchSampling):
    """A sort's order decides which of equal tokens are among the k."""

    def draw(self, logits: torch.Tensor, shaping: Shaping, uniforms: Any) -> Any:
        for row, top_k in zip(logits, shaping.top_k.tolist(), strict=True):
            if 0 < top_k < len(row):
                row[row.argsort(descending=True, stable=True)[top_k:]] = -math.inf
        return super().draw(logits, shaping, uniforms)


class TopPOfAll(TorchSampling):
    """Takes top-p before top-k."""

    def draw(self, logits: torch.Tensor, shaping: Shaping, uniforms: Any) -> Any:
        for row, top_p in zip(logits, shaping.top_p.tolist(), strict=True):
            ordered = row.double().softmax(-1).sort(descending=True)
            if top_p < 1:
                crossing = min(int(torch.searchsorted(ordered.values.cumsum(-1), top_p)), len(row) - 1)
                row[row < row[ordered.indices[crossing]]] = -math.inf
        shaping.top_p[:] = 1.0
        return super().draw(logits, shaping, uniforms)


class AbsoluteMinP(TorchSampling):
    def draw(self, logits: torch.Tensor, shaping: Shaping, uniforms: Any) -> Any:
        logits[logits.softmax(-1) < torch.from_numpy(shaping.min_p)[:, None]] = -math.inf
        return super().draw(logits, shaping, uniforms)


class LikeliestFirst(TorchSampling):
    """Its CDF runs over sorted tokens."""

    def draw(self, logits: torch.Tensor, shaping: Shaping, uniforms: Any) -> Any:
        ordered = logits.sort(descending=True, stable=True)
        places = torch.from_numpy(super().draw(ordered.values, shaping, uniforms)).unsqueeze(-1)
        return ordered.indices.gather(-1, places.clamp(min=0)).squeeze(-1).numpy()


class NeverGreedy(TorchSampling):
    def draw(self, logits: torch.Tensor, shaping: Shaping, uniforms: Any) -> Any:
        shaping.temperature[shaping.temperature == 0.0] = 0.5
        return super().draw(logits, shaping, uniforms)


class FeelsItsNeighbours(TorchSampling):
    """Its uniform numbers are one bit lower, the more rows there are."""

    def draw(self, logits: torch.Tensor, shaping: Shaping, uniforms: Any) -> Any:
        return super().draw(logits, shaping, np.maximum(uniforms - len(logits) * np.float32(2.0**-24), 0))


@pytest.mark.parametrize(
    ("kernel", "case", "message"),
    [
        (LastOfTies, "likeliest_is_the_lowest_of_the_largest[float32-260]", "likeliest: first wrong value at row"),
        (WritesIntoLogits, "likeliest_is_the_lowest_of_the_largest[float32-260]", "likeliest only reads: "),
        (NarrowTokens, "likeliest_is_the_lowest_of_the_largest[float32-7]", "expected an int64 array, got int32"),
        (OneBuffer, "tokens_are_new_memory", "tokens are new memory: first wrong value"),
        (TakesNaN, "rows_without_a_token_say_so[float32-7]", "rows without a token, likeliest: "),
        (BreaksTies, "drawn_tokens_are_those_of_the_cdf[float32-5003-top-20]", "inverse CDF: row"),
        (TopPOfAll, "drawn_tokens_are_those_of_the_cdf[float32-260-top-k and top-p]", "(kept set|inverse CDF): "),
        (AbsoluteMinP, "drawn_tokens_are_those_of_the_cdf[float32-7-min-p]", "inverse CDF: row"),
        (LikeliestFirst, "drawn_tokens_are_those_of_the_cdf[float32-260-nothing]", "inverse CDF: row"),
        (LikeliestFirst, "rows_without_a_token_say_so[float32-7]", "rows without a token, drawn: "),
        (NeverGreedy, "temperature_0_takes_the_likeliest[float32-260]", "temperature 0: first wrong value"),
        (FeelsItsNeighbours, "a_row_has_the_same_token_in_any_batch[32000]", "a row alone: first wrong value"),
    ],
)  # fmt: skip
def test_planted_bugs_are_found(kernel: type[TorchSampling], case: str, message: str) -> None:
    finds(SamplingKernelConformance, f"test_{case}", message, kernel=kernel)
