"""The suites of weights and decoders find the mistakes planted here, and name the property that does not hold."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from grouped_int4 import GroupedForm, GroupedInt4, grouped_sample
from planted import finds

from kvpage.api.attention import AttentionLayer
from kvpage.api.decoder import Reasons
from kvpage.api.model import DecoderEnv, DecoderSpec, LayerSpec, StepContext
from kvpage.api.quant import CheckpointView, LinearEnv, LinearSpec, TensorSpec, WeightForm
from kvpage.builtin.reference_attention import ReferenceAttention
from kvpage.models.decoder import Decoder, TorchDecoder
from kvpage.nn.linear import DenseLinear
from kvpage.nn.quantized_linear import Int8Linear
from kvpage.testing.decoder_backends import DecoderBackendConformance
from kvpage.testing.linear_kernels import LinearKernelConformance
from kvpage.testing.quantization import QuantSchemeConformance

# ---- quantization schemes -------------------------------------------------------------------------------


class OffByOneZero(GroupedInt4):
    def to_form(self, linear: LinearSpec, tensors: Mapping[str, torch.Tensor]) -> WeightForm:
        return replace(super().to_form(linear, tensors), zero=7)


class HighNibbleFirst(GroupedInt4):
    def to_form(self, linear: LinearSpec, tensors: Mapping[str, torch.Tensor]) -> WeightForm:
        packed = tensors["packed"]
        return super().to_form(linear, {**tensors, "packed": (packed >> 4) | (packed << 4)})


class KeepsScales(GroupedForm):
    """Its scales stay where the file had them."""

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> GroupedForm:
        return replace(self, packed=change(self.packed))


class TakesCodesOnly(GroupedForm):
    def take(self, rows: torch.Tensor) -> GroupedForm:
        return replace(self, packed=self.packed[rows])


class Remembers(GroupedForm):
    def dequantize(self) -> torch.Tensor:
        if not hasattr(self, "kept"):
            object.__setattr__(self, "kept", super().dequantize())
        kept: torch.Tensor = self.kept
        return kept


def made_of(form: type[GroupedForm]) -> type[GroupedInt4]:
    class Scheme(GroupedInt4):
        def to_form(self, linear: LinearSpec, tensors: Mapping[str, torch.Tensor]) -> WeightForm:
            return form(packed=tensors["packed"], scales=tensors["scales"], group=self.group, zero=self.zero)

    return Scheme


class AnyShape(GroupedInt4):
    """Asks for whatever is there."""

    def tensors(self, linear: LinearSpec, view: CheckpointView) -> Mapping[str, TensorSpec]:
        found = super().tensors(linear, view)
        return {
            suffix: replace(spec, shape=view.info(f"{linear.name}.{suffix}").shape)
            for suffix, spec in found.items()
        }


class AnyConfig(GroupedInt4):
    @classmethod
    def from_checkpoint(cls, config: Mapping[str, Any], view: CheckpointView) -> GroupedInt4:
        return cls(config.get("group_size", 8), 8)


class TakesTheHead(GroupedInt4):
    def tensors(self, linear: LinearSpec, view: CheckpointView) -> Mapping[str, TensorSpec]:
        return super().tensors(replace(linear, name="any"), view)


class WholeScales(GroupedInt4):
    """Every rank takes all scales, also where it has some of the groups only."""

    def tensors(self, linear: LinearSpec, view: CheckpointView) -> Mapping[str, TensorSpec]:
        return {
            **super().tensors(linear, view),
            "scales": replace(super().tensors(linear, view)["scales"], shard_dim=None),
        }


class WritesIntoTheFile(GroupedInt4):
    def to_form(self, linear: LinearSpec, tensors: Mapping[str, torch.Tensor]) -> WeightForm:
        tensors["scales"].mul_(1.5)
        return super().to_form(linear, tensors)


@pytest.mark.parametrize(
    ("scheme", "case", "message"),
    [
        (OffByOneZero, "dequantize_is_exact", "dequantize is exact: first wrong value at output 0, input 0: got"),
        (HighNibbleFirst, "dequantize_is_exact", "dequantize is exact: first wrong value"),
        (made_of(Remembers), "dequantize_gives_a_new_tensor", "dequantize is a new tensor"),
        (made_of(KeepsScales), "map_reaches_every_tensor", "map reaches every tensor"),
        (made_of(TakesCodesOnly), "take", r"take \(every other\): .*RuntimeError"),
        (AnyShape, "damaged_tensors_are_refused", "damaged tensor: .* shorter in dimension"),
        (AnyShape, "missing_tensors_are_refused", "missing tensor: .* KeyError"),
        (AnyConfig, "wrong_configs_are_refused", "wrong config: quantization_config .*expected CheckpointError"),
        (TakesTheHead, "plain_modules_are_left_alone", "plain modules: 'lm_head' is stored plain"),
        (WholeScales, "tensor_parallel_slices[8-2]", "tensor-parallel slice: .*RuntimeError"),
        (WritesIntoTheFile, "the_checkpoint_is_only_read", "the checkpoint is only read: .*scales, dimension 0"),
    ],
    ids=str,
)  # fmt: skip
def test_a_schemes_bug_is_named(scheme: type, case: str, message: str) -> None:
    def samples(self: Any) -> Any:
        yield "8", grouped_sample(8)

    name = f"test_{case}" if "[" in case else f"test_{case}[8]"
    finds(QuantSchemeConformance, name, message, scheme=scheme, samples=samples)


# ---- linear kernels -------------------------------------------------------------------------------------


class NoBias(Int8Linear):
    def prepare(self, form: WeightForm, bias: torch.Tensor | None) -> None:
        super().prepare(form, None)


class SlightlyOff(Int8Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 1.01


class ScaledByBatch(Int8Linear):
    """One scale for all rows: per-tensor dynamic quantization of x."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not x.numel():
            return super().forward(x)
        scale = x.abs().amax() / 1000
        return super().forward((x / scale).round() * scale)


class PlainProduct(DenseLinear):
    """What the library gives, however many rows there are."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, self._weight, self._bias)


class ReusesOutput(Int8Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = super().forward(x)
        self.out = getattr(self, "out", out) if getattr(self, "out", out).shape == out.shape else out
        return self.out.copy_(out)


class ReadsFlat(DenseLinear):
    """Takes x for contiguous."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.as_strided(x.shape, (x.shape[1], 1)))


class ScalesInPlace(Int8Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.mul_(1.0001))


class NoReason(Int8Linear):
    @classmethod
    def supports(cls, form: WeightForm, env: LinearEnv) -> list[str]:
        return ["" for _ in super().supports(form, env)]


@pytest.mark.parametrize(
    ("kernel", "case", "message"),
    [
        (NoBias, "bias_is_added[ChannelInt8-7x5-float32]", "bias: first wrong value at row 0, output 0: got"),
        (SlightlyOff, "output_equals_the_float64_product[ChannelInt8-64x48-float32]", "product: first wrong value"),
        (ScaledByBatch, "row_has_the_same_bits_in_any_batch[ChannelInt8-64x48-float32]", "row independence: .*rows against 300"),
        (PlainProduct, "row_has_the_same_bits_in_any_batch[Dense-130x256-float32]", "row independence: .*every bit must agree"),
        (ReusesOutput, "output_is_new_memory[ChannelInt8-7x5-float32]", "output is new memory"),
        (ReadsFlat, "strided_input[Dense-7x5-float32]", r"strided x \(columns of a wider tensor\)"),
        (ScalesInPlace, "input_and_form_are_only_read[ChannelInt8-7x5-float32]", "x is only read"),
        (NoReason, "refusals_have_reasons", "reasons: supports\\(\\) of .* expected a list of sentences"),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)  # fmt: skip
def test_a_kernels_bug_is_named(kernel: type, case: str, message: str) -> None:
    finds(LinearKernelConformance, f"test_{case}", message, kernel=kernel)


# ---- decoder backends -----------------------------------------------------------------------------------


def changed(change: Callable[[DecoderSpec], DecoderSpec]) -> type[TorchDecoder]:
    """A backend that computes another model than the spec says."""

    class Changed(TorchDecoder):
        def build(self, spec: DecoderSpec, weights: Mapping[str, WeightForm], env: DecoderEnv) -> Decoder:
            return super().build(change(spec), weights, env)

    return Changed


def layers(spec: DecoderSpec, **values: Any) -> DecoderSpec:
    def one(layer: LayerSpec) -> LayerSpec:
        return replace(layer, **values)

    return replace(spec, layers=tuple(one(layer) for layer in spec.layers))


class RowByRow(TorchDecoder):
    """Writes a row's K and V when it comes to that row, after others have attended."""

    def build(self, spec: DecoderSpec, weights: Mapping[str, WeightForm], env: DecoderEnv) -> Any:
        decoder = super().build(spec, weights, env)

        class Model:
            def forward(self, ids: torch.Tensor, positions: torch.Tensor, ctx: StepContext) -> torch.Tensor:
                group = ctx.group(0)
                ends = group.batch.cu_seqlens_q.tolist()
                out = torch.empty(len(ids), spec.hidden_size, dtype=getattr(torch, env.dtype))
                slots = group.batch.slot_mapping.clone()
                for first, last in pairwise(ends):
                    group.batch.slot_mapping.fill_(-1)
                    group.batch.slot_mapping[first:last] = slots[first:last]
                    out[first:last] = decoder.forward(ids, positions, ctx)[first:last]
                return out

            def logits(self, hidden: torch.Tensor) -> torch.Tensor:
                return decoder.logits(hidden)

        return Model()


class RefusesSilently(TorchDecoder):
    def build(self, spec: DecoderSpec, weights: Mapping[str, WeightForm], env: DecoderEnv) -> Any:
        return Reasons(()) if spec.head.tied else super().build(spec, weights, env)


class TouchesPadding(TorchDecoder):
    """Takes slot -1 for an index: the last of the pool."""

    def build(self, spec: DecoderSpec, weights: Mapping[str, WeightForm], env: DecoderEnv) -> Any:
        decoder = super().build(spec, weights, env)

        class Model:
            def forward(self, ids: torch.Tensor, positions: torch.Tensor, ctx: StepContext) -> torch.Tensor:
                for tensor in ctx.group(0).tensors:
                    tensor[-1] = 0.0
                return decoder.forward(ids, positions, ctx)

            def logits(self, hidden: torch.Tensor) -> torch.Tensor:
                return decoder.logits(hidden)

        return Model()


class TurnsByPosition(TorchDecoder):
    """Reaches the cache by itself, and takes positions for the rows of the rotary tables."""

    def build(self, spec: DecoderSpec, weights: Mapping[str, WeightForm], env: DecoderEnv) -> Any:
        decoder = super().build(spec, weights, env)

        class Context:
            def __init__(self, positions: torch.Tensor, ctx: StepContext) -> None:
                self.positions, self.ctx = positions, ctx

            def attend(self, layer: Any, q: Any, k: Any, v: Any, sinks: Any = None) -> torch.Tensor:
                group, index = self.ctx.group(layer.kv_group), layer.kv_index
                kv, rope, batch = group.tensors[index], group.ropes[index], group.batch
                q, _ = group.backend.rope_write(q, k, v, self.positions, rope, kv, batch)
                own = AttentionLayer(index=index, scale=layer.scale, window=layer.window)
                out = torch.empty(len(q), layer.num_heads, layer.v_head_dim, dtype=q.dtype)
                group.backend.attend(q, kv, own, batch, group.plan, out)
                return out

        class Model:
            def forward(self, ids: torch.Tensor, positions: torch.Tensor, ctx: StepContext) -> torch.Tensor:
                return decoder.forward(ids, positions, Context(positions, ctx))

            def logits(self, hidden: torch.Tensor) -> torch.Tensor:
                return decoder.logits(hidden)

        return Model()


@pytest.mark.parametrize(
    ("decoder", "case", "message"),
    [
        (TurnsByPosition, "whole_prompt[llama-float32]", "prompt: first wrong value at token 0"),
        (changed(lambda s: layers(s, residual="sequential")), "whole_prompt[parallel-float32]", "prompt: first wrong value at token 0"),
        (changed(lambda s: layers(s, residual_multiplier=1.0)), "whole_prompt[multipliers-float32]", "prompt: first wrong value at token 0"),
        (changed(lambda s: replace(s, head=replace(s.head, softcap=None))), "whole_prompt[mixed-window-float32]", "logits: first wrong value"),
        (RowByRow, "blocks_shared_within_a_step[llama]", "borrower of shared blocks: first wrong value at token"),
        (TouchesPadding, "padding_writes_nothing[llama]", "padding writes nothing: .*slot -1 was written to"),
        (RefusesSilently, "something_is_built", r"reasons: biased-qk-norm in float32 was refused with \(\)"),
    ],
    ids=["turns-by-position", "sequential", "multiplier", "softcap", "row-by-row", "padding", "no-reasons"],
)  # fmt: skip
def test_a_decoders_bug_is_named(decoder: type, case: str, message: str) -> None:
    finds(
        DecoderBackendConformance,
        f"test_{case}",
        message,
        decoder=decoder,
        attention_backend=ReferenceAttention,
    )
