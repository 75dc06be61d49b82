"""Looking tokens up in a quantized table: the rows of its exact values, in the model's dtype."""

from __future__ import annotations

import pytest
import torch

from kvpage.api.model import EmbeddingSpec
from kvpage.api.quant import ChannelInt8, Dense, GroupedInt, WeightForm
from kvpage.nn.embedding import Embedding


def tables() -> dict[str, WeightForm]:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 256, (40, 32), generator=generator)
    scales = torch.rand(40, 2, generator=generator).bfloat16()
    return {
        "int8": ChannelInt8(codes=(codes - 128).to(torch.int8), scales=scales[:, 0].float()),
        "int4": GroupedInt(codes=codes.to(torch.uint8), scales=scales, group=32, offsets=scales),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("scale", [1.0, 3.3])
def test_rows_are_those_of_the_dequantized_table(kind: str, dtype: torch.dtype, scale: float) -> None:
    form = tables()[kind]
    spec = EmbeddingSpec(scale=scale)
    plain = {"embed.weight": Dense(form.dequantize().to(dtype))}
    for tokens in ([7, 3, 7, 7, 39, 0], [5], []):
        ids = torch.tensor(tokens, dtype=torch.int64)
        found = Embedding(spec, {"embed.weight": form}, dtype)(ids, torch.arange(len(tokens)))
        expected = Embedding(spec, plain, dtype)(ids, torch.arange(len(tokens)))
        assert found.dtype == dtype
        assert torch.equal(found, expected)


def test_the_result_may_be_written() -> None:
    embedding = Embedding(EmbeddingSpec(), {"embed.weight": tables()["int8"]}, torch.float32)
    ids = torch.tensor([4, 4, 9])
    first = embedding(ids, torch.arange(3))
    kept = first.clone()
    first.zero_()
    assert torch.equal(embedding(ids, torch.arange(3)), kept)
