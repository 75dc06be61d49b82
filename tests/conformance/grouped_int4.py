"""A small packed format, for the suite of quantization schemes: 4 bits, group scales, zero points."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from kvpage.api.quant import CheckpointView, LinearSpec, QuantScheme, TensorSpec, WeightForm
from kvpage.errors import CheckpointError
from kvpage.testing.checkpoints import QuantSample, linear


@dataclass(frozen=True, kw_only=True, eq=False)
class GroupedForm(WeightForm):
    """weight[o, i] = (code[o, i] - zero) * scales[o, i // group]; two codes a byte, the low one first."""

    packed: torch.Tensor
    scales: torch.Tensor
    group: int
    zero: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.packed.shape[0], self.packed.shape[1] * 2)

    def dequantize(self) -> torch.Tensor:
        codes = torch.stack((self.packed & 15, self.packed >> 4), -1).flatten(1).float()
        return (codes - self.zero) * self.scales.repeat_interleave(self.group, 1)

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> GroupedForm:
        return replace(self, packed=change(self.packed), scales=change(self.scales))

    def take(self, rows: torch.Tensor) -> GroupedForm:
        return replace(self, packed=self.packed[rows], scales=self.scales[rows])


class GroupedInt4(QuantScheme):
    """``name.packed`` uint8 [out, in / 2] and ``name.scales`` float32 [out, in / group]."""

    def __init__(self, group: int, zero: int) -> None:
        self.group, self.zero = group, zero

    @classmethod
    def from_checkpoint(cls, config: Mapping[str, Any], view: CheckpointView) -> GroupedInt4:
        if config.get("bits") != 4 or not isinstance(config.get("group_size"), int):
            raise CheckpointError(f"grouped has 4 bits and a group_size, got {dict(config)}")
        return cls(config["group_size"], config.get("zero", 8))

    def tensors(self, linear: LinearSpec, view: CheckpointView) -> Mapping[str, TensorSpec]:
        if "lm_head" in linear.name:
            return {}
        rows, inputs = linear.out_features, linear.in_features
        cut = 0 if linear.cut == "outputs" else 1
        packs = {} if linear.cut == "outputs" else {"pack": 2}
        groups = {} if linear.cut == "outputs" else {"group": self.group}
        return {
            "packed": TensorSpec(shape=(rows, inputs // 2), dtype="uint8", shard_dim=cut, **packs),
            "scales": TensorSpec(
                shape=(rows, inputs // self.group), dtype="float32", shard_dim=cut, **groups
            ),
        }

    def to_form(self, linear: LinearSpec, tensors: Mapping[str, torch.Tensor]) -> WeightForm:
        return GroupedForm(
            packed=tensors["packed"], scales=tensors["scales"], group=self.group, zero=self.zero
        )


def grouped_sample(group: int) -> QuantSample:
    """A checkpoint of it with an oracle, a plain head, and configs to be refused."""
    generator = torch.Generator().manual_seed(group)
    specs = (
        linear("model.layers.0.self_attn.q_proj", 24, 2 * group),
        linear("model.layers.0.self_attn.o_proj", 12, 4 * group),
        linear("model.layers.0.mlp.up_proj", 9, group),
    )
    tensors, oracle = {}, {}
    for spec in specs:
        shape = (spec.out_features, spec.in_features)
        codes = torch.randint(0, 16, shape, dtype=torch.uint8, generator=generator)
        scales = torch.rand(shape[0], shape[1] // group, generator=generator)
        tensors[f"{spec.name}.packed"] = codes[:, 0::2] | (codes[:, 1::2] << 4)
        tensors[f"{spec.name}.scales"] = scales
        oracle[spec.name] = torch.stack(
            [(codes[:, i].float() - 8) * scales[:, i // group] for i in range(shape[1])], 1
        )
    tensors["lm_head.weight"] = torch.randn(10, 8, generator=generator)
    return QuantSample(
        config={"quant_method": "grouped", "bits": 4, "group_size": group},
        tensors=tensors,
        linears=specs,
        oracle=oracle,
        plain=(linear("lm_head", 10, 8, "head.weight"),),
        wrong_configs=({"bits": 3, "group_size": group}, {"bits": 4}, {"bits": 4, "group_size": "all"}),
    )
