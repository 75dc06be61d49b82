"""int8 while loading: every linear layer of a plain checkpoint in half the bytes of bfloat16."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from kvpage.api.quant import (
    ChannelInt8,
    CheckpointView,
    LinearSpec,
    QuantScheme,
    TensorSpec,
    WeightForm,
)
from kvpage.errors import CheckpointError

LEVELS = 127
BYTES_AT_ONCE = 2**20
"""Of the float32 values that exist at one time."""


class Int8PerChannel(QuantScheme):
    """Symmetric int8 with one scale an output, the largest magnitude / 127; activations stay as they are.

    Within 1/254 of each output's largest weight. The head, routers and gates of shared experts stay plain: they
    are small, or errors in them cost most.
    """

    quantizes_plain: ClassVar[bool] = True

    @classmethod
    def from_checkpoint(cls, config: Mapping[str, Any], view: CheckpointView) -> Int8PerChannel:
        return cls()

    def tensors(self, linear: LinearSpec, view: CheckpointView) -> Mapping[str, TensorSpec]:
        if any(_stays_plain(name) for name in linear.parameters):
            return {}
        shape = (linear.out_features, linear.in_features)
        cut = 0 if linear.cut == "outputs" else 1
        return {"weight": TensorSpec(shape=shape, dtype="float32", shard_dim=cut)}

    def to_form(self, linear: LinearSpec, tensors: Mapping[str, torch.Tensor]) -> WeightForm:
        weight = tensors["weight"]
        codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
        scales = torch.empty(weight.shape[:1], dtype=torch.float32, device=weight.device)
        step = max(1, BYTES_AT_ONCE // (4 * max(1, weight.shape[1])))
        for start in range(0, weight.shape[0], step):
            rows = slice(start, start + step)
            values = weight[rows].float()
            scale = values.abs().amax(1) / LEVELS
            if not bool(scale.isfinite().all()):
                raise CheckpointError(
                    f"the weight of {linear.name!r} holds NaN or infinity; download it again"
                )
            scales[rows] = scale
            values /= torch.where(scale > 0, scale, 1.0).unsqueeze(1)
            codes[rows] = values.round_().clamp_(-LEVELS, LEVELS).to(torch.int8)
        return ChannelInt8(codes=codes, scales=scales)


def _stays_plain(name: str) -> bool:
    return name.startswith("head.") or ".router." in name or ".shared_gate." in name
