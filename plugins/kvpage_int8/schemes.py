"""The schemes: which matrices they take, and in what form."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from kvpage import CheckpointError, ConfigError
from kvpage.api.quant import (
    ChannelInt8,
    CheckpointView,
    GroupedInt,
    LinearSpec,
    QuantScheme,
    TensorSpec,
    WeightForm,
)
from kvpage_int8.plugin import GROUPS, OPTIONS
from kvpage_int8.rounding import Rounder


class OnTheFly(QuantScheme):
    """What the schemes share: all linear layers, output head and token embedding; each output by itself.

    Routers and the gates of shared experts stay plain: they are small, and an error in them sends tokens elsewhere.
    """

    quantizes_plain: ClassVar[bool] = True
    quantizes_tables: ClassVar[bool] = True
    row_by_row: ClassVar[bool] = True
    dynamic: ClassVar[bool] = True
    """Whether kernels may quantize activations too."""

    def __init__(self, *, quantize_head: bool = True) -> None:
        """``quantize_head``: the output head and the token embedding too, which are one matrix in many models."""
        self._quantize_head = quantize_head
        self._rounder = Rounder()

    @classmethod
    def from_checkpoint(cls, config: Mapping[str, Any], view: CheckpointView) -> OnTheFly:
        """Raises ConfigError: ``config`` has another key than ``quantize_head``, or no bool there."""
        for key, value in config.items():
            if key not in OPTIONS:
                raise ConfigError(f"quantization_config has {key!r}; known are {', '.join(OPTIONS)}")
            if not isinstance(value, bool):
                raise ConfigError(f"quantization_config: {key} must be true or false, got {value!r:.80}")
        return cls(**config)

    def tensors(self, linear: LinearSpec, view: CheckpointView) -> Mapping[str, TensorSpec]:
        if any(self._stays_plain(name) for name in linear.parameters):
            return {}
        shape = (linear.out_features, linear.in_features)
        cut = 0 if linear.cut == "outputs" else 1
        return {"weight": TensorSpec(shape=shape, dtype="float32", shard_dim=cut)}

    def to_form(self, linear: LinearSpec, tensors: Mapping[str, torch.Tensor]) -> WeightForm:
        form = self._round(tensors["weight"])
        if not bool(form.scales.isfinite().all()):
            raise CheckpointError(f"the weight of {linear.name!r} holds NaN or infinity; download it again")
        return form

    @abstractmethod
    def _round(self, weight: torch.Tensor) -> ChannelInt8 | GroupedInt:
        """weight [out, in] of any floating dtype."""

    def _round_to_int8(self, weight: torch.Tensor) -> ChannelInt8:
        codes, scales = self._rounder.channels(weight)
        return ChannelInt8(codes=codes, scales=scales, activation="per-token" if self.dynamic else "none")

    def _stays_plain(self, name: str) -> bool:
        if name.startswith(("head.", "embed.")):
            return not self._quantize_head
        return ".router." in name or ".shared_gate." in name


class Int8(OnTheFly):
    """Symmetric int8 with one scale an output, within 1/254 of its largest weight (LLM.int8(), arXiv:2208.07339,
    without outliers); activations become int8 with one scale a token where a kernel does so."""

    def _round(self, weight: torch.Tensor) -> ChannelInt8:
        return self._round_to_int8(weight)


class Int8WeightOnly(Int8):
    """The same weights; activations stay as they are."""

    dynamic: ClassVar[bool] = False


class Int4(OnTheFly):
    """4 bits and a bfloat16 scale for each 128 inputs of an output; activations may become int8 by groups.

    Where 128 does not divide a matrix's inputs groups are of 64 or 32; where these do not either it is int8.
    """

    def _round(self, weight: torch.Tensor) -> ChannelInt8 | GroupedInt:
        group = next((size for size in GROUPS if weight.shape[1] % size == 0), None)
        if group is None:
            return self._round_to_int8(weight)
        codes, scales = self._rounder.groups(weight, group)
        return GroupedInt(
            codes=codes, scales=scales, group=group, activation="per-group" if self.dynamic else "none"
        )


class Int4WeightOnly(Int4):
    """The same weights; activations stay as they are."""

    dynamic: ClassVar[bool] = False
